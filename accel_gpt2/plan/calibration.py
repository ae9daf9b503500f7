"""What this machine measured before, against what was predicted: the residuals that plans use.

One JSON line per measurement (`train.calibration` writes them), keyed by device, driver, torch and
sharding strategy. Reading never fails: what cannot be read is not counted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accel_gpt2.catalog.gpus import GpuSpec
from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.recipe import TrainRecipe

Quantity = Literal["allocated_bytes", "reserved_bytes", "tokens_per_second"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """One training's, or one bench's, predicted and measured memory and speed.

    `device` is a GPU's catalog name, the driver's own name for a GPU without a row, or "cpu";
    `driver` the version of its driver, for a CPU its model and threads. Predictions are those of
    the formula alone, without residuals; None is unknown.
    """

    date: str
    device: str
    driver: str
    torch: str
    strategy: str
    model: str
    n_layer: int
    n_embd: int
    vocab_size: int
    mixed_precision: str
    finetuning: str
    optimizer: str
    gradient_checkpointing: bool
    micro_batch_tokens: int
    num_processes: int
    predicted_allocated_bytes: int | None
    measured_allocated_bytes: int | None
    predicted_reserved_bytes: int | None
    measured_reserved_bytes: int | None
    predicted_tokens_per_second: float | None
    measured_tokens_per_second: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """measured / predicted, and the range that the records spread over; `source` says of which."""

    ratio: float
    low: float
    high: float
    num_records: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The records of one file, oldest first."""

    records: tuple[CalibrationRecord, ...] = ()

    def residual(
        self,
        quantity: Quantity,
        *,
        gpu: GpuSpec | None,
        strategy: str,
        recipe: TrainRecipe,
        model: ModelSpec,
    ) -> Residual | None:
        """What a prediction is to be multiplied by; None where nothing comparable was measured."""
        raise NotImplementedError


def read_records(path: Path) -> Calibration:
    """The records of a file; none where there is no file, and lines that cannot be read are left
    out."""
    raise NotImplementedError
