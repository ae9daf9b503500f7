"""How long a training takes: seconds from operations, bytes and launches, as a range."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.plan.calibration import Calibration
from accel_gpt2.plan.data import DataStatistics
from accel_gpt2.recipe import TrainRecipe

if TYPE_CHECKING:
    from accel_gpt2.catalog.strategies import ShardingStrategy


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondsRange:
    """A duration as well as it is known."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeTerm:
    """One part of a duration; `why` is one sentence with its formula and the source."""

    name: str
    seconds: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePlan:
    """The time of a whole run, all classes one after another, and of one optimizer step.

    `tokens_per_second` and `mfu` (None where the peak is unknown) are of training steps alone, over
    all processes; tokens are predicted tokens, padding not counted. `num_steps` and `train_tokens`
    are of all classes and epochs. `source` says what the numbers rest on.
    """

    total: SecondsRange
    terms: tuple[TimeTerm, ...]
    step_seconds: SecondsRange
    step_terms: tuple[TimeTerm, ...]
    tokens_per_second: float
    mfu: float | None
    num_steps: int
    train_tokens: int
    source: str


def plan_time(
    recipe: TrainRecipe,
    model: ModelSpec,
    profile: HardwareProfile,
    strategy: "ShardingStrategy",
    data: DataStatistics,
    *,
    calibration: Calibration | None = None,
) -> TimePlan | None:
    """The time of a run; None on a GPU that has no catalog row and was never measured."""
    raise NotImplementedError
