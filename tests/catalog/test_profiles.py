"""Profile rows: consistent with the GPU rows, and without influence on the global batch."""

from accel_gpt2.catalog.gpus import GPUS
from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.recipe import FIELDS


def test_the_promised_profiles_exist() -> None:
    """Every profile that the documentation names is a row; `auto` is detection and is not."""
    assert set(PROFILES) == {
        "rtx4070ti",
        "rtx4070ti-12gb",
        "2x-rtx4070ti",
        "rtx3090",
        "rtx4090",
        "4x-rtx3090",
        "4x-rtx4090",
        "a100-40",
        "a100-80",
        "h100-80",
        "h200",
        "l4",
        "t4",
        "cpu",
    }


def test_rtx4070ti_is_the_16_gb_super() -> None:
    """The person's own card is the SUPER; the 12 GB card has a name of its own."""
    gpu = PROFILES["rtx4070ti"].gpu
    assert gpu is not None
    assert "SUPER" in gpu.display_name
    assert PROFILES["rtx4070ti-12gb"].gpu is GPUS["rtx4070ti-12gb"]


def test_precision_is_one_that_the_gpu_computes_fast() -> None:
    """A profile with a GPU names a precision that the GPU has tensor-core peaks for."""
    for profile in PROFILES.values():
        precision = profile.recipe_defaults["mixed_precision"]
        if profile.gpu is None:
            assert precision == "no"
        else:
            assert str(precision) in profile.gpu.peak_flops
            assert profile.num_gpus >= 1


def test_profiles_set_recipe_keys_and_never_the_global_batch() -> None:
    """A profile changes how a run goes: known keys, and no global batch among them."""
    for profile in PROFILES.values():
        assert set(profile.recipe_defaults) <= set(FIELDS)
        assert not {"global_batch_tokens", "global_batch_size"} & set(profile.recipe_defaults)
