"""Numbers that go wrong: when a step is skipped, when the run stops, and what is written down.

The rule. A step whose gradient norm is not finite on any rank changes nothing: neither weights nor
optimizer state. In fp16 an overflow of the scaled gradients is the loss scaler's business: it skips
and halves the scale, and the run stops when the scale has fallen below `MIN_LOSS_SCALE`. Any other
such step, and any whose loss is not finite, is written to `nonfinite.jsonl` with its documents, and
`MAX_SKIPPED_IN_A_ROW` of them in a row stop the run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel_gpt2.data.batching import Indices
from accel_gpt2.errors import UserError
from accel_gpt2.train.processes import gather_objects
from accel_gpt2.train.run_log import append_json_line

NONFINITE_FILE = "nonfinite.jsonl"  # in each class's directory

# One bad document in a shuffled epoch is skipped once an epoch; weights that have gone wrong make
# every step bad. Three tell the two apart.
MAX_SKIPPED_IN_A_ROW = 3

# The loss is a mean over tokens: with a scale below one, gradients that overflow fp16 are above
# 65,504 themselves.
MIN_LOSS_SCALE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchLoss:
    """What one micro batch on one rank gave: its documents and the sum of its token losses."""

    documents: Indices
    loss: torch.Tensor  # scalar, detached


def describe_losses(micro_batches: Sequence[MicroBatchLoss], accelerator: Any) -> list[Any]:
    """(documents, loss) of every micro batch of a step, on all ranks; the same on each."""
    own = [([int(i) for i in item.documents], float(item.loss)) for item in micro_batches]
    return [item for rank in gather_objects(accelerator, own) for item in rank]


def left_to_the_scaler(losses: Sequence[tuple[list[int], float]], scaler: Any) -> bool:
    """Whether a bad gradient is fp16's overflow alone, which the loss scaler deals with."""
    return scaler is not None and all(math.isfinite(loss) for _, loss in losses)


def write_nonfinite_step(
    class_directory: Path,
    *,
    where: dict[str, object],
    losses: Sequence[tuple[list[int], float]],
    grad_norm: float,
    rows: Any,
) -> None:
    """Add a skipped step to `nonfinite.jsonl`: the documents whose loss is not finite, or all.

    Args:
        rows: the row of each training document of the class in its split, as in scores.parquet.
    """
    bad = [item for item in losses if not math.isfinite(item[1])] or list(losses)
    append_json_line(
        class_directory / NONFINITE_FILE,
        {
            **where,
            "grad_norm": str(grad_norm),  # as text, because JSON has no NaN
            "micro_batches": [
                {"loss": str(loss), "document_rows": [int(rows[i]) for i in documents]}
                for documents, loss in bad
            ],
        },
    )


def check_loss_scale(scaler: Any, *, name: str, step: int, skipped: int) -> None:
    """Raise UserError when fp16's loss scale has collapsed, with what that means."""
    scale = scaler.get_scale()
    if scale < MIN_LOSS_SCALE:
        raise UserError(
            f"{name}: fp16's loss scale fell to {scale:g} at step {step}, after {skipped} skipped "
            "steps in a row: the gradients overflow fp16 whatever their scale, so nothing is "
            "learnt; give --mixed-precision bf16 (RTX 30, A100 and later) or no, or a smaller "
            "--learning-rate. The last whole checkpoint stands."
        )


def diverged(name: str, directory: Path, step: int) -> UserError:
    """For MAX_SKIPPED_IN_A_ROW bad steps in a row."""
    return UserError(
        f"{name}: loss or gradients of {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {step}, "
        "are not finite, and nothing was saved from them; their documents are in "
        f"{directory / NONFINITE_FILE}. Look at these texts, or start again with a smaller "
        "--learning-rate; it goes on from the last whole checkpoint."
    )
