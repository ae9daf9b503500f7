"""Which recipe to train: every candidate is planned, and what is not recommended has a reason.

What was given (options, file, environment) is pinned; what is free is searched, at the global batch
of the recipe, so that every machine trains the same model.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from accel_gpt2.catalog.models import MODELS, ModelSpec
from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import STRATEGIES, ShardingStrategy
from accel_gpt2.errors import UsageError
from accel_gpt2.plan.calibration import Calibration
from accel_gpt2.plan.data import DataStatistics, dataset_statistics
from accel_gpt2.plan.memory import ByteRange, MemoryPlan, Verdict, plan_memory
from accel_gpt2.plan.placement import Placement
from accel_gpt2.plan.throughput import SecondsRange, TimePlan, plan_time
from accel_gpt2.recipe import Layer, ResolvedRecipe, TrainRecipe, resolve

# faithful: the recipe that changes the least about plain full fine-tuning. quality: fp32 arithmetic
# before that. speed: the fastest. memory: the smallest.
Preference = Literal["faithful", "speed", "memory", "quality"]

# What the search may choose; the first three change the result.
RESULT_CHOICES = ("finetuning", "mixed_precision", "optimizer")
RUN_CHOICES = ("gradient_checkpointing", "micro_batch_tokens")
CHOICES = (*RESULT_CHOICES, *RUN_CHOICES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One candidate: a whole recipe, how it is spread over the machine, and what that would take.

    `level` counts from the most faithful choice that was possible. `device` is what one GPU holds
    with all models that are on it at once; `memory` is of one model. `seconds` are of all classes;
    None where the data set's size or the GPU's speed is unknown, and then `cost_usd` is None too.
    """

    recipe: TrainRecipe
    origins: Mapping[str, str]
    level: int
    strategy: ShardingStrategy
    placement: Placement
    memory: MemoryPlan
    device: ByteRange
    time: TimePlan | None
    seconds: SecondsRange | None
    cost_usd: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """What was not recommended, and why, in one clause; `option` is None where no plan was made."""

    label: str
    reason: str
    option: Option | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestChange:
    """The smallest change that makes a training fit, in words that can be typed."""

    advice: str
    option: Option


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What would happen, and what else could: everything that `accel-gpt2 plan` shows.

    `recommended` is None when nothing that this version trains fits; `nearest` then says what to
    change. `alternatives` fit too, best first. `data` is None where the data set must be read first.
    """

    asked: ResolvedRecipe
    profile: HardwareProfile
    model: ModelSpec
    data: DataStatistics | None
    prefer: Preference
    recommended: Option | None
    alternatives: tuple[Option, ...]
    rejected: tuple[Rejected, ...]
    nearest: NearestChange | None
