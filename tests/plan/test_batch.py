"""The micro-batch table: it fits by the arithmetic that it was made from."""

import pytest

from accel_gpt2.catalog.models import MODELS, ModelSpec
from accel_gpt2.catalog.profiles import PROFILES, HardwareProfile
from accel_gpt2.plan.batch import profile_recipe_defaults
from accel_gpt2.recipe import FIELDS, Layer, resolve
from accel_gpt2.units import GIB

GPU_PROFILES = [profile for profile in PROFILES.values() if profile.gpu is not None]


def full_finetuning_bytes(profile: HardwareProfile, model: ModelSpec) -> tuple[float, float]:
    """State and activation bytes of the table's choice: AdamW, 16-bit autocast, dropout."""
    chosen = profile_recipe_defaults(profile, model)
    tokens = int(str(chosen["micro_batch_tokens"]))
    block = 86 * model.n_embd * tokens
    checkpointed = 4 * model.n_embd * model.n_layer * tokens + block
    activations = checkpointed if chosen["gradient_checkpointing"] else block * model.n_layer
    return 18.0 * model.num_parameters, float(activations)


@pytest.mark.parametrize("profile", GPU_PROFILES, ids=lambda profile: profile.name)
def test_what_can_fit_fits(profile: HardwareProfile) -> None:
    """Where the training state leaves room, the chosen micro-batch stays within the memory."""
    assert profile.gpu is not None
    checked = 0
    for model in MODELS.values():
        state, activations = full_finetuning_bytes(profile, model)
        if state + 3 * GIB < profile.gpu.memory_bytes:
            assert state + activations + 2 * GIB < profile.gpu.memory_bytes, model.name
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_defaults_make_a_valid_recipe_and_leave_the_global_batch(profile: HardwareProfile) -> None:
    """A profile's values pass the strict reader, and the global batch is the same everywhere."""
    assert len(MODELS) == 11
    for model in MODELS.values():
        objective = "generative" if model.model_type == "gpt2" else "masked_lm"
        model_layer = Layer(origin="--model", values={"model": model.name, "objective": objective})
        values = profile_recipe_defaults(profile, model)
        assert set(values) <= set(FIELDS)
        with_profile = resolve([Layer(origin="profile", values=values), model_layer]).recipe
        assert with_profile.global_batch_tokens == resolve([model_layer]).recipe.global_batch_tokens
        assert with_profile.micro_batch_tokens >= 1024


def test_more_memory_never_means_a_smaller_micro_batch() -> None:
    """Along growing memory, tokens without checkpointing never fall back."""
    by_memory = sorted(GPU_PROFILES, key=lambda profile: profile.gpu.memory_bytes)  # type: ignore[union-attr]
    for model in MODELS.values():
        choices = [profile_recipe_defaults(profile, model) for profile in by_memory]
        ranks = [(not c["gradient_checkpointing"], c["micro_batch_tokens"]) for c in choices]
        assert ranks == sorted(ranks), model.name


def test_cpu_is_fp32_with_4096_tokens() -> None:
    """The CPU computes in fp32, without checkpointing."""
    assert profile_recipe_defaults(PROFILES["cpu"], MODELS["gpt2"]) == {
        "mixed_precision": "no",
        "micro_batch_tokens": 4096,
        "gradient_checkpointing": False,
    }


def test_an_unknown_model_is_treated_as_the_largest() -> None:
    """A hub id without a row gets the careful choice of gpt2-xl."""
    profile = PROFILES["a100-40"]
    unknown = profile_recipe_defaults(profile, None)
    assert unknown == profile_recipe_defaults(profile, MODELS["gpt2-xl"])
    assert unknown["gradient_checkpointing"] is True
