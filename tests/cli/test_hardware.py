"""Detection, the choice of a profile, and what is said when the machine is not what it promises."""

import os
from pathlib import Path

import pytest

from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.cli.hardware import (
    DetectedGpu,
    _container_memory_bytes,
    check_profile,
    choose_profile,
    detect_hardware,
    parse_nvidia_smi,
    planned_profile,
    profile_for,
)
from accel_gpt2.errors import DoesNotFitError, UsageError
from accel_gpt2.units import GIB, MIB
from tests.cli.conftest import SUPER, machine

T4 = DetectedGpu(name="Tesla T4", memory_bytes=15360 * MIB, compute_capability=(7, 5))
RTX_4070_TI = DetectedGpu(
    name="NVIDIA GeForce RTX 4070 Ti", memory_bytes=12282 * MIB, compute_capability=(8, 9)
)
UNHEARD_OF = DetectedGpu(
    name="NVIDIA GeForce RTX 9090", memory_bytes=64 * GIB, compute_capability=(12, 0)
)

TWO_CARDS = """\
GPU-aaaa1111, NVIDIA GeForce RTX 4070 Ti SUPER, 16376, 8.9
GPU-bbbb2222, NVIDIA GeForce RTX 4070 Ti, 12282, 8.9
"""


def fake_nvidia_smi(folder: Path, answer: str, *, exit_code: int = 0) -> str:
    """A program called nvidia-smi that gives this answer; returns a PATH that finds it first."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}END\nexit {exit_code}\n", "utf-8")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_detection_reads_what_nvidia_smi_prints(tmp_path: Path) -> None:
    """Name, memory and capability of each card come from the program's own output."""
    path = fake_nvidia_smi(tmp_path, TWO_CARDS)
    detected = detect_hardware({"PATH": path})
    assert detected.gpus == (SUPER, RTX_4070_TI)
    assert detected.num_cores >= 1
    assert detected.host_memory_bytes > GIB // 4


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", (RTX_4070_TI,)),
        ("1,0", (RTX_4070_TI, SUPER)),
        ("GPU-bbbb", (RTX_4070_TI,)),
        ("0,7,1", (SUPER,)),
    ],
)
def test_visible_devices_are_honoured(
    tmp_path: Path, visible: str, expected: tuple[DetectedGpu, ...]
) -> None:
    """nvidia-smi ignores CUDA_VISIBLE_DEVICES, and detection does not: indices, UUIDs, order."""
    path = fake_nvidia_smi(tmp_path, TWO_CARDS)
    detected = detect_hardware({"PATH": path, "CUDA_VISIBLE_DEVICES": visible})
    assert detected.gpus == expected
    assert detected.hidden_by is None


@pytest.mark.parametrize(
    ("variables", "hidden_by"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES"),
        ({"ACCELERATE_USE_CPU": "true"}, "ACCELERATE_USE_CPU"),
    ],
)
def test_hidden_gpus_are_not_there_and_the_variable_is_named(
    tmp_path: Path, variables: dict[str, str], hidden_by: str
) -> None:
    """A GPU that a variable hides is not used, and the warning says which variable it is."""
    path = fake_nvidia_smi(tmp_path, TWO_CARDS)
    detected = detect_hardware({"PATH": path, **variables})
    assert detected.gpus == ()
    assert detected.hidden_by == hidden_by
    (warning,) = check_profile("auto", PROFILES["cpu"], detected, "no")
    assert warning == f"No GPU was found: running on the CPU ({hidden_by} hides the GPUs)."


def test_a_driver_that_does_not_answer_is_no_gpu(tmp_path: Path) -> None:
    """A failing nvidia-smi (driver mismatch) is not an error of ours."""
    path = fake_nvidia_smi(tmp_path, "Failed to initialize NVML\n", exit_code=18)
    assert detect_hardware({"PATH": path}).gpus == ()


def test_lines_that_are_no_gpu_are_left_out() -> None:
    """Warnings between the rows, and cards whose memory is not available, are not invented."""
    answer = f"WARNING: infoROM is corrupted\n{TWO_CARDS}GPU-cc, NVIDIA GB10, [N/A], 12.1\n"
    assert [gpu for _, gpu in parse_nvidia_smi(answer)] == [SUPER, RTX_4070_TI]


@pytest.mark.parametrize(
    ("gpus", "name"),
    [
        ((), "cpu"),
        ((SUPER,), "rtx4070ti"),
        ((SUPER, SUPER), "2x-rtx4070ti"),
        ((RTX_4070_TI,), "rtx4070ti-12gb"),
        ((T4,), "t4"),
        ((T4, T4), "auto"),
        ((SUPER, RTX_4070_TI), "auto"),
        ((UNHEARD_OF,), "auto"),
    ],
)
def test_a_machine_is_the_profile_that_describes_it(
    gpus: tuple[DetectedGpu, ...], name: str
) -> None:
    """A row where GPU and number match; otherwise a profile of what is there, named auto."""
    profile = profile_for(machine(*gpus))
    assert profile.name == name
    assert profile.num_gpus == len(gpus)


def test_an_unknown_gpu_is_described_as_seen_and_not_guessed() -> None:
    """Memory and precision are detected; peaks stay unknown, so that MFU does too."""
    profile = profile_for(machine(UNHEARD_OF))
    assert profile.gpu is not None
    assert profile.gpu.memory_bytes == UNHEARD_OF.memory_bytes
    assert dict(profile.gpu.peak_flops) == {}
    assert profile.gpu.bandwidth_bytes_per_second is None
    assert dict(profile.recipe_defaults) == {"mixed_precision": "bf16"}


def test_an_unknown_old_gpu_gets_a_precision_that_it_has() -> None:
    """Volta and Turing compute fp16; what is older or unknown computes fp32."""
    old = DetectedGpu(name="Quadro RTX 5000", memory_bytes=16 * GIB, compute_capability=(7, 5))
    older = DetectedGpu(name="Tesla P100", memory_bytes=16 * GIB, compute_capability=(6, 0))
    assert profile_for(machine(old)).recipe_defaults["mixed_precision"] == "fp16"
    assert profile_for(machine(older)).recipe_defaults["mixed_precision"] == "no"


def test_of_different_gpus_the_smallest_speaks() -> None:
    """Data-parallel training on a mixed pair must fit on the smaller card."""
    profile = profile_for(machine(SUPER, RTX_4070_TI))
    assert profile.gpu is not None
    assert profile.gpu.name == "rtx4070ti-12gb"


def test_a_smaller_card_than_promised_does_not_fit() -> None:
    """The 12 GB card is not the 16 GB profile: the right profile is named, exit code 3."""
    with pytest.raises(
        DoesNotFitError,
        match=r"rtx4070ti promises 16\.0 GiB .* 12\.0 GiB\. Give --profile rtx4070ti-12gb\.",
    ) as caught:
        choose_profile("rtx4070ti", machine(RTX_4070_TI))
    assert caught.value.exit_code == 3


def test_fewer_cards_than_promised_do_not_fit() -> None:
    """Two cards in the profile and one in the machine: the one-card profile is named."""
    with pytest.raises(
        DoesNotFitError,
        match=r"2x-rtx4070ti promises 2 GPUs, and 1 can be used here\. Give --profile rtx4070ti\.",
    ):
        choose_profile("2x-rtx4070ti", machine(SUPER))


def test_all_that_is_missing_is_named_at_once() -> None:
    """Too few and too small cards come in one sentence."""
    with pytest.raises(DoesNotFitError, match=r"4 GPUs, and 1 .*; it promises 24\.0 GiB"):
        choose_profile("4x-rtx4090", machine(T4))


def test_a_larger_card_is_welcome() -> None:
    """A profile is what a run may count on, not what the machine must be."""
    assert choose_profile("rtx4070ti", machine(UNHEARD_OF)) is PROFILES["rtx4070ti"]
    assert check_profile("rtx4070ti", PROFILES["rtx4070ti"], machine(UNHEARD_OF), "bf16") == []


def test_without_a_gpu_every_profile_runs_on_the_cpu_and_says_so() -> None:
    """The person's own command works on a laptop, with one clear sentence."""
    profile = choose_profile("rtx4070ti", machine())
    assert profile is PROFILES["cpu"]
    (warning,) = check_profile("rtx4070ti", profile, machine(), "no")
    assert warning == (
        "Profile rtx4070ti has RTX 4070 Ti SUPER 16 GB, but no GPU was found: running on the CPU."
    )


def test_the_cpu_can_be_chosen_beside_a_gpu_without_a_warning() -> None:
    """`--profile cpu` is a choice."""
    assert choose_profile("cpu", machine(SUPER)) is PROFILES["cpu"]
    assert check_profile("cpu", PROFILES["cpu"], machine(SUPER), "no") == []


def test_unused_gpus_are_mentioned() -> None:
    """Half of the machine idle is worth a sentence."""
    (warning,) = check_profile("rtx4070ti", PROFILES["rtx4070ti"], machine(SUPER, SUPER), "bf16")
    assert warning == "2 GPUs can be used here, and profile rtx4070ti uses 1."


def test_less_host_memory_than_promised_is_a_warning() -> None:
    """Host memory is checked, with room for what firmware keeps."""
    warnings = check_profile(
        "rtx4070ti", PROFILES["rtx4070ti"], machine(SUPER, host_gib=16), "bf16"
    )
    assert warnings == [
        "Profile rtx4070ti counts on 32.0 GiB of host memory, and this machine has 16.0 GiB."
    ]
    assert not check_profile(
        "rtx4070ti", PROFILES["rtx4070ti"], machine(SUPER, host_gib=31), "bf16"
    )


def test_an_unknown_profile_names_the_nearest_and_all() -> None:
    """A misspelt profile is a usage error."""
    with pytest.raises(UsageError, match=r"no profile 'rtx4070'\. Did you mean 'rtx4070ti'\?"):
        choose_profile("rtx4070", machine())


def test_a_slow_or_impossible_precision_is_said_before_the_training() -> None:
    """bf16 on a CPU or a T4 is slow and warned of; fp16 on a CPU cannot be trained."""
    for precision in ("bf16", "pure_bf16"):
        (warning,) = check_profile("cpu", PROFILES["cpu"], machine(), precision)
        assert f"is {precision}: most CPUs compute bf16 far more slowly than fp32" in warning
        (warning,) = check_profile("t4", PROFILES["t4"], machine(T4), precision)
        assert f"is {precision}: T4 16 GB only emulates bf16" in warning
    with pytest.raises(DoesNotFitError, match=r"'fp16' needs a GPU.*--mixed-precision no"):
        check_profile("cpu", PROFILES["cpu"], machine(), "fp16")


@pytest.mark.parametrize(
    ("content", "limit"), [("2147483648\n", 2 * GIB), ("max\n", float("inf")), ("?", float("inf"))]
)
def test_a_container_has_no_more_memory_than_its_limit(
    tmp_path: Path, content: str, limit: float
) -> None:
    """The kernel kills what takes more; a machine without a limit has a file that says so."""
    file = tmp_path / "memory.max"
    file.write_text(content, "ascii")
    assert _container_memory_bytes(file) == limit
    assert _container_memory_bytes(tmp_path / "none") == float("inf")


def test_a_plan_is_for_the_named_machine_and_not_for_this_one() -> None:
    """A laptop plans for an A100; `auto` and `cpu` are this machine with its own memory."""
    assert planned_profile("a100-80", machine) is PROFILES["a100-80"]
    here = planned_profile("cpu", lambda: machine(SUPER, host_gib=7))
    assert (here.gpu, here.host_memory_bytes) == (None, 7 * GIB)
    assert planned_profile("auto", lambda: machine(SUPER)).name == "rtx4070ti"
    with pytest.raises(UsageError, match=r"no profile 'rtx4070'\. Did you mean 'rtx4070ti'\?"):
        planned_profile("rtx4070", machine)
