"""Machines to choose for, and a way to run the command line as a person does."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
        if name.startswith("ACCEL_GPT2_") or name in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}:
            monkeypatch.delenv(name)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def accel_gpt2(tmp_path: Path) -> Run:
    """Runs `accel-gpt2 ARGUMENTS` in an empty folder, as its own process, 80 columns wide."""

    def run(*arguments: str, stdin: str | None = None, **variables: str) -> object:
        program = "from accel_gpt2.cli.app import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            check=False,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "80", **variables},
            input="" if stdin is None else stdin,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run  # type: ignore[return-value]
