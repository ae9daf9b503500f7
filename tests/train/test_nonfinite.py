"""Numbers that go wrong, with torch's own loss scaler."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from accel_gpt2.errors import UserError
from accel_gpt2.train.nonfinite import (
    check_loss_scale,
    left_to_the_scaler,
    write_nonfinite_step,
)


def _scaler(init_scale: float) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    scaler.scale(torch.ones(()))  # the scale is made at its first use
    return scaler


def test_overflow_is_left_to_the_scaler_and_a_bad_loss_is_not() -> None:
    """Only fp16 has a scaler, and only a finite loss says that the scale was the reason."""
    assert left_to_the_scaler([([1, 2], 3.0)], _scaler(8.0))
    assert not left_to_the_scaler([([1, 2], 3.0), ([4], float("nan"))], _scaler(8.0))
    assert not left_to_the_scaler([([1, 2], 3.0)], None)


def test_a_collapsing_scale_is_explained() -> None:
    """Overflow at every scale: torch's scaler skips and halves, and below one we say why."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = _scaler(16.0)
    for skipped in range(1, 5):
        weight.grad = torch.full((3,), float("inf"))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        check_loss_scale(scaler, name="pos (1/2)", step=skipped, skipped=skipped)
    assert torch.equal(weight.detach(), torch.ones(3))
    weight.grad = torch.full((3,), float("inf"))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    with pytest.raises(UserError, match=r"scale fell to 0\.5 at step 5, after 5 .*bf16"):
        check_loss_scale(scaler, name="pos (1/2)", step=5, skipped=5)


def test_the_bad_micro_batches_documents_are_written(tmp_path: Path) -> None:
    """Rows of the split, not positions in the class; all of them where every loss is finite."""
    rows = np.array([10, 11, 12, 13, 14])
    for losses in ([([0, 1], 2.5), ([3], float("nan"))], [([0, 1], 2.5), ([4], 3.5)]):
        write_nonfinite_step(
            tmp_path, where={"step": 7}, losses=losses, grad_norm=float("inf"), rows=rows
        )
    lines = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert first == {
        "step": 7,
        "grad_norm": "inf",
        "micro_batches": [{"loss": "nan", "document_rows": [13]}],
    }
    assert [item["document_rows"] for item in second["micro_batches"]] == [[10, 11], [14]]
