"""Machines to choose for, and a way to run the command line as a person does."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from accel_gpt2.cli.app import main
from accel_gpt2.cli.hardware import DetectedGpu, DetectedHardware
from accel_gpt2.units import GIB, MIB

SUPER = DetectedGpu(
    name="NVIDIA GeForce RTX 4070 Ti SUPER", memory_bytes=16376 * MIB, compute_capability=(8, 9)
)


def machine(
    *gpus: DetectedGpu, host_gib: int = 128, hidden_by: str | None = None
) -> DetectedHardware:
    """A machine as detection describes it."""
    return DetectedHardware(
        gpus=gpus, host_memory_bytes=host_gib * GIB, num_cores=8, hidden_by=hidden_by
    )


@pytest.fixture(autouse=True)
def _no_recipe_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        setting = name.startswith("ACCEL_GPT2_") and name != "ACCEL_GPT2_CACHE"  # the tests' own
        if setting or name in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}:
            monkeypatch.delenv(name)


CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def accel_gpt2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    """Runs `accel-gpt2 ARGUMENTS` in an empty folder, 80 columns wide, to its exit."""

    def run_to_exit(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["accel-gpt2", *arguments])
        for name, value in {"COLUMNS": "80", **variables}.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(
            args=arguments, returncode=int(ended.value.code or 0), stdout=said.out, stderr=said.err
        )

    return run_to_exit
