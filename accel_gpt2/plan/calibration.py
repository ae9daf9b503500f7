"""What this machine measured before, against what was predicted: the residuals that plans use.

One JSON line per measurement (`train.calibration` writes them), keyed by device, driver, torch and
sharding strategy. Reading never fails: what cannot be read is not counted.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

from accel_gpt2.catalog.gpus import GpuSpec
from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.plan.memory import ByteRange, MemoryPlan
from accel_gpt2.recipe import TrainRecipe

Quantity = Literal["allocated_bytes", "reserved_bytes", "tokens_per_second"]

# In the folder that data.cache.cache_directory names.
CALIBRATION_FILE = "calibration.jsonl"

# To be raised whenever the arithmetic of memory or time changes: older residuals are of another
# formula and are left out.
FORMULA_VERSION = 3

# Of the records that are nearest, so many of the newest count.
_NEWEST = 9
# Configurations are alike when no more than this apart, and say nothing beyond `_FARTHEST`.
_ALIKE = 0.5
_FARTHEST = 8.0
# A plan of the same configuration is held to 15% (the target); one of another is the less
# certain, the farther it is.
_LEAST_SPREAD = 0.15
_SPREAD_PER_DISTANCE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """One training's, or one bench's, predicted and measured memory and speed.

    `device` is a GPU's catalog name, the driver's own name for a GPU without a row, or "cpu";
    `driver` the version of its driver, for a CPU its model and threads. Predictions are those of
    the formula alone, without residuals; None is unknown.
    """

    formula_version: int = FORMULA_VERSION
    date: str
    device: str
    driver: str
    torch: str
    strategy: str
    num_processes: int
    model: str
    n_layer: int
    n_embd: int
    vocab_size: int
    mixed_precision: str
    finetuning: str
    optimizer: str
    gradient_checkpointing: bool
    micro_batch_tokens: int
    context_tokens: float
    predicted_allocated_bytes: int | None
    measured_allocated_bytes: int | None
    predicted_reserved_bytes: int | None
    measured_reserved_bytes: int | None
    predicted_tokens_per_second: float | None
    measured_tokens_per_second: float | None

    def ratio(self, quantity: Quantity) -> float | None:
        """measured / predicted, None where one of them is missing."""
        predicted = getattr(self, f"predicted_{quantity}")
        measured = getattr(self, f"measured_{quantity}")
        return measured / predicted if predicted and measured else None

    def distance(self, recipe: TrainRecipe, model: ModelSpec) -> float:
        """How unlike another configuration it is: 1 for each factor of 4 in model size, of 16 in
        micro batch, and for each choice that is another; 0 for the same."""
        size = _parameters(self) / _parameters(model)
        batch = self.micro_batch_tokens / recipe.micro_batch_tokens
        others = (
            (self.mixed_precision, recipe.mixed_precision),
            (self.finetuning, recipe.finetuning),
            (self.optimizer, recipe.optimizer),
            (self.gradient_checkpointing, recipe.gradient_checkpointing),
        )
        return (
            abs(math.log(size, 4))
            + abs(math.log(batch, 16))
            + sum(mine != other for mine, other in others)
        )


def _parameters(model: ModelSpec | CalibrationRecord) -> float:
    return 12.0 * model.n_layer * model.n_embd**2 + model.vocab_size * model.n_embd


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
        """What a prediction is to be multiplied by; None where nothing comparable was measured.

        The median of the newest records among those whose configuration is nearest. After an
        upgrade of driver or torch the records before it are left out.
        """
        here = [
            (record, ratio)
            for record in self.records
            if record.device == device_name(gpu) and record.strategy == strategy
            if (ratio := record.ratio(quantity)) is not None
        ]
        if not here:
            return None
        newest = here[-1][0]
        apart = [
            (record.distance(recipe, model), ratio)
            for record, ratio in here
            if (record.driver, record.torch) == (newest.driver, newest.torch)
        ]
        nearest = min(distance for distance, _ in apart)
        if nearest > _FARTHEST:
            return None
        ratios = [ratio for distance, ratio in apart if distance <= nearest + _ALIKE][-_NEWEST:]
        ratio = statistics.median(ratios)
        spread = 1 + _LEAST_SPREAD + _SPREAD_PER_DISTANCE * nearest
        like = "this configuration" if nearest <= _ALIKE else "others, the nearest"
        count = f"{len(ratios)} measurement{'' if len(ratios) == 1 else 's'}"
        return Residual(
            ratio=ratio,
            low=min(*ratios, ratio / spread),
            high=max(*ratios, ratio * spread),
            num_records=len(ratios),
            source=f"by {count} of {like} on this {device_name(gpu)} ({newest.date[:10]})",
        )


def device_name(gpu: GpuSpec | None) -> str:
    """What records call a device.

    >>> device_name(None)
    'cpu'
    """
    if gpu is None:
        return "cpu"
    return gpu.display_name if gpu.name == "unknown" else gpu.name


def read_records(path: Path) -> Calibration:
    """The records of a file; none where there is no file, and lines that cannot be read are left
    out, as are those of another formula."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Calibration()
    found = (parse_record(line) for line in lines)
    return Calibration(records=tuple(record for record in found if record is not None))


_TYPES = get_type_hints(CalibrationRecord)


def parse_record(line: str) -> CalibrationRecord | None:
    """The record of one JSON line; None for anything else.

    >>> parse_record("{") is None
    True
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, Mapping) or values.keys() != _TYPES.keys():
        return None
    if values["formula_version"] != FORMULA_VERSION:
        return None
    if not all(_is_sound(value, _TYPES[name]) for name, value in values.items()):
        return None
    return CalibrationRecord(**values)


def _is_sound(value: object, kind: object) -> bool:
    """Whether a value is of its field's type, and if a number then positive and finite."""
    if value is None:
        return kind in (int | None, float | None)
    if kind is str or kind is bool:
        return type(value) is kind
    if kind in (int, int | None) and type(value) is not int:
        return False
    return type(value) in (int, float) and 0 < value < 1e18  # type: ignore[operator]


def calibrated_memory(
    plan: MemoryPlan,
    calibration: Calibration,
    *,
    gpu: GpuSpec | None,
    strategy: str,
    recipe: TrainRecipe,
    model: ModelSpec,
) -> MemoryPlan:
    """The plan with what the allocator really reserved on this device, where that was measured.

    The terms stay the formula's own, so that a wrong one shows. Neither number falls below what is
    allocated.
    """
    residual = calibration.residual(
        "reserved_bytes", gpu=gpu, strategy=strategy, recipe=recipe, model=model
    )
    if residual is None:
        return plan
    floor, before = plan.allocated_bytes, plan.reserved
    reserved = ByteRange(
        low=max(floor, round(before.expected * residual.low)),
        expected=max(floor, round(before.expected * residual.ratio)),
        high=max(floor, round(before.expected * residual.high)),
    )
    device = ByteRange(
        low=plan.device.low + reserved.low - before.low,
        expected=plan.device.expected + reserved.expected - before.expected,
        high=plan.device.high + reserved.high - before.high,
    )
    return dataclasses.replace(plan, reserved=reserved, device=device)
