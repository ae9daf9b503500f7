"""What a search finds: options, why all but one are not recommended, and what would help."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.plan.calibration import Quantity, Residual
from accel_gpt2.plan.candidates import Preference, describe_recipe
from accel_gpt2.plan.data import DataStatistics
from accel_gpt2.plan.memory import ByteRange, MemoryPlan, MemoryTerm, Verdict
from accel_gpt2.plan.placement import PLACEMENTS, Placement
from accel_gpt2.plan.throughput import SecondsRange, TimePlan
from accel_gpt2.recipe import ResolvedRecipe, TrainRecipe

# A recipe that contradicts itself is refused; what does not go together with it is unsupported.
Why = Literal[
    "refused",
    "unsupported",
    "does not fit",
    "not needed",
    "less faithful",
    "tight",
    "slower",
    "larger",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One candidate: a whole recipe, how it is spread over the machine, and what that would take.

    `level` counts from the most faithful choice that what was given allows. `memory` is of one
    model, `device` of all that one GPU holds at once, `host` of all the RAM at once, `disk` of the
    whole run, and `verdict` is about the device and the RAM.
    `time.total` is of all classes one after another, `time_share` the part of it that the placement
    takes, and `seconds` what is left of it; None where the data set has to be read first, or the
    GPU's speed is unknown.
    """

    resolved: ResolvedRecipe
    level: int
    strategy: ShardingStrategy
    placement: Placement
    memory: MemoryPlan
    device: ByteRange
    host: tuple[MemoryTerm, ...]
    disk: tuple[MemoryTerm, ...]
    verdict: Verdict
    time: TimePlan | None
    time_share: float
    seconds: SecondsRange | None

    @property
    def recipe(self) -> TrainRecipe:
        """Everything that would be trained with."""
        return self.resolved.recipe

    @property
    def host_bytes(self) -> int:
        """RAM of the machine."""
        return sum(term.bytes for term in self.host)

    @property
    def disk_bytes(self) -> int:
        """Disk of the run directory at its fullest."""
        return sum(term.bytes for term in self.disk)

    @property
    def cost_usd(self) -> float | None:
        """Of the expected time, at the recipe's price of the whole machine."""
        price = self.recipe.price_usd_per_hour
        if price is None or self.seconds is None:
            return None
        return self.seconds.expected / 3600 * price

    @property
    def label(self) -> str:
        """The choice in a few words."""
        spread: list[str] = [] if self.strategy.backend == "none" else [self.strategy.name]
        spread += [] if self.placement == "sequential" else [PLACEMENTS[self.placement].title]
        return ", ".join([describe_recipe(self.recipe), *spread])

    @property
    def group(self) -> tuple[int, str, str]:
        """What it has in common with the options that cut its steps in other ways."""
        return self.level, self.strategy.name, self.placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """What is not recommended and the one reason, a clause.

    `option` is None where a rule of recipes or of libraries stands against it; `instead` is then
    what to type, where that is known.
    """

    label: str
    why: Why
    reason: str
    option: Option | None
    instead: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestChange:
    """The smallest change that makes a training fit: what to type, and what that gives."""

    change: str
    option: Option


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What would happen, and what else could: everything that `accel-gpt2 plan` shows.

    `recommended` is None when nothing fits; `nearest` then says what to change, if anything helps.
    `smallest` needs least of all that the host's memory allows. `rejected`
    are all candidates but the recommended one, best first. `data` is None where the data set has to
    be read first. `residuals` are what was measured on this device, over what is predicted for the
    recommended option without it.
    """

    asked: ResolvedRecipe
    profile: HardwareProfile
    model: ModelSpec
    data: DataStatistics | None
    prefer: Preference
    recommended: Option | None
    smallest: Option
    rejected: tuple[Rejected, ...]
    nearest: NearestChange | None
    residuals: Mapping[Quantity, Residual]

    @property
    def alternatives(self) -> tuple[Rejected, ...]:
        """The best of each other group that fits as well."""
        mine = None if self.recommended is None else self.recommended.group
        return tuple(
            x
            for x in _first_of_each_group(self.rejected)
            if x.option is not None and x.option.group != mine and x.why != "does not fit"
        )

    @property
    def failures(self) -> tuple[Rejected, ...]:
        """Of each group where nothing fits what needs least; and recipes that are refused."""
        failed = [x for x in self.rejected if x.why in {"does not fit", "refused"}]
        fitting = {x.option.group for x in self.alternatives if x.option is not None}
        if self.recommended is not None:
            fitting.add(self.recommended.group)
        return tuple(
            x
            for x in _first_of_each_group(failed)
            if x.option is None or x.option.group not in fitting
        )


def _first_of_each_group(rejected: Iterable[Rejected]) -> list[Rejected]:
    first: dict[object, Rejected] = {}
    for x in rejected:
        first.setdefault(x.label if x.option is None else x.option.group, x)
    return list(first.values())


# Of what is drawn; smaller terms are drawn together.
_SMALLEST_SHARE = 0.02

AROUND_TERMS = ("smaller terms", "fragmentation", "context and libraries", "the other models")


def memory_parts(option: Option) -> list[tuple[str, int]]:
    """What one device holds at the fullest moment, for a picture: names and bytes that sum up.

    The terms of the peak, what the allocator reserves besides, and what libraries take outside of
    it; of models side by side, all together.
    """
    memory = option.memory
    terms = [(term.name, term.bytes) for term in memory.terms]
    small = [size for _, size in terms if size < _SMALLEST_SHARE * memory.allocated_bytes]
    parts = [(n, size) for n, size in terms if size >= _SMALLEST_SHARE * memory.allocated_bytes]
    around = (
        sum(small),
        memory.reserved.expected - memory.allocated_bytes,
        memory.device.expected - memory.reserved.expected,
        option.device.expected - memory.device.expected,
    )
    parts += zip(AROUND_TERMS, around, strict=True)
    return [(name, size) for name, size in parts if size > 0]
