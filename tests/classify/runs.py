"""Runs that are stopped on the way, and what two runs have in common."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from accel_gpt2.classify.fit import fit
from accel_gpt2.errors import ExitCode, StoppedEarly
from accel_gpt2.train.stopping import StopRequest

from .conftest import read_log

# Dropout draws other numbers for other shapes. AdamW divides by the gradient's size, so where that
# is near its default epsilon of 1e-8 it would turn a rounding difference into a whole step.
ROUNDING_STAYS_SMALL: dict[str, Any] = {"dropout": 0.0, "adam_epsilon": 1e-5, "max_steps": 8}


def stop_at_question(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A real SIGTERM when the training asks for the `number`-th time whether to stop."""
    ask = StopRequest.requested
    asked = 0

    def counting(self: StopRequest, device: torch.device) -> bool:
        nonlocal asked
        asked += 1
        if asked == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, device)

    monkeypatch.setattr(StopRequest, "requested", counting)


def train_and_stop(resolved: Any, run: Path, number: int) -> None:
    """Train until the `number`-th question whether to stop, and stop there, saved."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at_question(patch, number)
        with pytest.raises(StoppedEarly, match="Stopped by SIGTERM; the work is saved") as stopped:
            fit(resolved, run, quiet=True)
    assert stopped.value.exit_code == ExitCode.STOPPED


def final_weights(run: Path) -> list[dict[str, torch.Tensor]]:
    """The exported tensors of all models."""
    files = sorted(run.glob("class-*/final/*.safetensors"))
    assert len(files) == json.loads((run / "plan.json").read_text())["num_models"], files
    return [load_file(file) for file in files]


def assert_same_models(run: Path, other: Path) -> None:
    """Two runs ended with the same tensors, bit for bit."""
    for mine, theirs in zip(final_weights(run), final_weights(other), strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert torch.equal(tensor, theirs[name]), name


def assert_close_models(run: Path, other: Path, *, rtol: float) -> None:
    """Two runs ended with the same tensors, up to rounding; 0 means bit for bit."""
    for mine, theirs in zip(final_weights(run), final_weights(other), strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=rtol, atol=rtol)


def losses(run: Path) -> list[tuple[int, int, float]]:
    """(class, step, loss) of every step, the last row where there are several."""
    rows = {
        (row["class_index"], row["step"]): row["loss"]
        for row in read_log(run)
        if row["event"] == "step"
    }
    return [(*key, loss) for key, loss in sorted(rows.items())]


def unfinished_copy(run: Path, folder: Path, class_index: int = 0) -> tuple[Path, Path]:
    """A copy of a finished run in which one class lacks `final/`, and that class's directory."""
    shutil.copytree(run, folder, symlinks=True)
    (class_directory,) = folder.glob(f"class-{class_index}-*")
    shutil.rmtree(class_directory / "final")
    return folder, class_directory
