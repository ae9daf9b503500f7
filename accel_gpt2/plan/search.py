"""Which recipe to train: every candidate is planned, and what is not recommended has its reason.

What was given (options, file, environment) is pinned; what is free is searched, at the global batch
of the recipe, so that every machine trains the same model.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from accel_gpt2.catalog.models import MODELS, ModelSpec
from accel_gpt2.catalog.profiles import PROFILES, HardwareProfile
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.errors import UsageError
from accel_gpt2.plan.calibration import Calibration, Quantity, Residual, calibrated_memory
from accel_gpt2.plan.candidates import (
    CHOICES,
    Preference,
    cuts,
    describe_recipe,
    fewest_checkpointed,
    levels,
    pinned,
    plan_origin,
    spreads,
)
from accel_gpt2.plan.data import DataStatistics, dataset_statistics
from accel_gpt2.plan.memory import ByteRange, MemoryPlan, Verdict, covers, plan_memory
from accel_gpt2.plan.placement import (
    PLACEMENTS,
    Placement,
    models_per_gpu,
    num_models,
    placed_device,
    time_share,
)
from accel_gpt2.plan.support import refusal
from accel_gpt2.plan.throughput import SecondsRange, TimePlan, plan_time
from accel_gpt2.recipe import Layer, ResolvedRecipe, TrainRecipe, resolve
from accel_gpt2.units import format_bytes, format_seconds

_FAITHFUL: frozenset[Preference] = frozenset({"faithful", "quality"})

# Where faithfulness comes first, what is planned below the first level that fits: all of it, what
# leaves the host's memory alone, or nothing.
Depth = Literal["all", "some", "none"]

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
    model, `device` of all that one GPU holds at once, and `verdict` is about that and host memory.
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
    verdict: Verdict
    time: TimePlan | None
    time_share: float
    seconds: SecondsRange | None

    @property
    def recipe(self) -> TrainRecipe:
        """Everything that would be trained with."""
        return self.resolved.recipe

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

    `option` is None where a rule of recipes or of libraries stands against it.
    """

    label: str
    why: Why
    reason: str
    option: Option | None


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


class MemoryOf(Protocol):
    """The signature of `plan_memory`."""

    def __call__(
        self,
        recipe: TrainRecipe,
        model: ModelSpec,
        profile: HardwareProfile,
        strategy: ShardingStrategy,
        *,
        longest_tokens: int,
    ) -> MemoryPlan: ...


class TimeOf(Protocol):
    """The signature of `plan_time`."""

    def __call__(
        self,
        recipe: TrainRecipe,
        model: ModelSpec,
        profile: HardwareProfile,
        strategy: ShardingStrategy,
        data: DataStatistics,
        *,
        calibration: Calibration | None = None,
    ) -> TimePlan | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Situation:
    """What every candidate is planned for, and with."""

    profile: HardwareProfile
    model: ModelSpec
    data: DataStatistics  # assumed where it is not known
    data_is_known: bool
    prefer: Preference
    placements: frozenset[Placement]
    strategy: ShardingStrategy | None
    depth: Depth
    only_rounding: bool
    calibration: Calibration | None
    memory_of: MemoryOf
    time_of: TimeOf


def plan_run(
    layers: Sequence[Layer],
    profile: HardwareProfile,
    *,
    model: ModelSpec | None = None,
    data: DataStatistics | None = None,
    prefer: Preference = "faithful",
    placements: Iterable[Placement] = tuple(PLACEMENTS),
    strategy: ShardingStrategy | None = None,
    depth: Depth = "all",
    only_rounding: bool = False,
    calibration: Calibration | None = None,
    memory_of: MemoryOf = plan_memory,
    time_of: TimeOf = plan_time,
) -> RunPlan:
    """The recommended recipe for what was given on a machine, and why not another one.

    Faithful training comes first: full fine-tuning with fp32 weights and AdamW, then 8-bit states,
    then pure bf16, then LoRA, then QLoRA; what steps on the host comes after all that does not.
    Within a level the fastest that fits wins, and of those
    that are alike to 1% the one that leaves more memory free; one that is tight wins only where
    nothing in the level fits, and then the smallest.

    Args:
        layers: what was given; all of it is kept.
        profile: the machine; without a GPU its RAM is the device.
        model: the shape; None for that of the recipe's catalog row.
        data: None for the statistics of the catalog's row.
        placements: the ways to place the classes that are considered.
        strategy: the one that is asked for; None for whichever is best.
        depth: what is planned below the first level that fits; it does not change the answer.
        only_rounding: whether to search only what changes rounding (how a step is cut), and leave
            what else is free at the first of the faithful order.

    Raises:
        UsageError: when what was given is no recipe, or nothing can train it as it is asked for.
    """
    asked = resolve(layers)
    data = data or dataset_statistics(asked.recipe)
    situation = _Situation(
        profile=profile,
        model=model or MODELS[asked.recipe.model],
        data=data or _assumed_data(asked.recipe),
        data_is_known=data is not None,
        prefer=prefer,
        placements=frozenset(placements),
        strategy=strategy,
        depth=depth,
        only_rounding=only_rounding,
        calibration=calibration,
        memory_of=memory_of,
        time_of=time_of,
    )
    options, refused = _candidates(layers, situation)
    if not options:
        raise UsageError(f"{situation.model.name} cannot be trained as asked: {refused[0].reason}.")
    best = _best(options, situation)
    others = sorted(
        (x for x in options if x is not best),
        key=functools.partial(_order_of_rejected, prefer=prefer),
    )
    return RunPlan(
        asked=asked,
        profile=profile,
        model=situation.model,
        data=data,
        prefer=prefer,
        recommended=best,
        smallest=min(
            options, key=lambda x: (_lacks_host_memory(x.memory, profile), x.device.expected)
        ),
        rejected=(*(_rejected(x, best, situation) for x in others), *refused),
        nearest=None if best is not None else _nearest_change(layers, situation),
        residuals={} if best is None else _residuals(best, situation),
    )


def _residuals(option: Option, situation: _Situation) -> dict[Quantity, Residual]:
    if situation.calibration is None:
        return {}
    found = {
        quantity: situation.calibration.residual(
            quantity,
            gpu=situation.profile.gpu,
            strategy=option.strategy.name,
            recipe=option.recipe,
            model=situation.model,
        )
        for quantity in get_args(Quantity)
    }
    return {quantity: residual for quantity, residual in found.items() if residual is not None}


def _assumed_data(recipe: TrainRecipe) -> DataStatistics:
    """To compare the speed of candidates by, where the data set has not been read."""
    return DataStatistics(
        num_classes=max(1, len(recipe.class_names)),
        num_train_documents=10_000,
        num_validation_documents=1_000,
        num_test_documents=1_000,
        mean_tokens=recipe.max_length / 2,
        mean_context_tokens=recipe.max_length / 2,
        longest_tokens=recipe.max_length,
        source="assumed: the data set has not been read",
    )


def _candidates(
    layers: Sequence[Layer], situation: _Situation
) -> tuple[list[Option], list[Rejected]]:
    """Every option, and what no option can be made of."""
    profile, data = situation.profile, situation.data
    options: list[Option] = []
    refused: list[Rejected] = []

    def refuse(label: str, why: Why, reason: str) -> None:
        refused.append(Rejected(label=label, why=why, reason=reason, option=None))

    fitted = False
    tried = levels(layers, profile, fp32_first=situation.prefer == "quality")
    for number, level in enumerate(tried[:1] if situation.only_rounding else tried):
        if level.resolved is None:
            refuse(level.label, "refused", level.problem)
            continue
        longest_tokens = min(data.longest_tokens, level.resolved.recipe.max_length)
        cut = list(cuts(level.resolved, layers, profile, longest_tokens=longest_tokens))
        plans: _Plans = {}
        for strategy, placement in spreads(
            level.resolved.recipe,
            profile,
            num_classes=data.num_classes,
            strategy=situation.strategy,
        ):
            if placement not in situation.placements:
                continue
            if fitted and situation.depth == "some" and _is_last_resort(strategy, situation):
                continue
            refused_for = refusal(level.resolved.recipe, strategy, placement)
            if refused_for is not None:
                spread = strategy.name if placement == "sequential" else placement
                refuse(f"{level.label}, {spread}", "unsupported", refused_for.reason)
                continue
            planned = functools.partial(
                _planned,
                level=number,
                strategy=strategy,
                placement=placement,
                longest_tokens=longest_tokens,
                situation=situation,
                plans=plans,
            )
            found = [planned(resolved) for resolved in cut]
            options += found
            if "checkpointed_layers" not in pinned(layers):
                options += _partly_checkpointed(
                    list(zip(cut, found, strict=True)), planned, situation.model
                )
        best = _best(options, situation)
        fitted = (
            situation.prefer in _FAITHFUL
            and best is not None
            and not _is_last_resort(best.strategy, situation)
        )
        if fitted and situation.depth == "none":
            break
    return options, refused


# Of one level, by strategy and recipe: placements share them.
_Plans = dict[tuple[str, TrainRecipe], tuple[MemoryPlan, TimePlan | None]]


def _planned(
    resolved: ResolvedRecipe,
    *,
    level: int,
    strategy: ShardingStrategy,
    placement: Placement,
    longest_tokens: int,
    situation: _Situation,
    plans: _Plans,
) -> Option:
    key = strategy.name, resolved.recipe
    if key not in plans:
        plans[key] = _plans(resolved.recipe, strategy, longest_tokens, situation)
    memory, time = plans[key]
    return _option(resolved, level, strategy, placement, memory, time, situation)


def _partly_checkpointed(
    whole_or_none: Sequence[tuple[ResolvedRecipe, Option]],
    planned: Callable[[ResolvedRecipe], Option],
    model: ModelSpec,
) -> Iterator[Option]:
    """For each micro batch that fits with all blocks checkpointed and not with none, the option
    with as few as fit."""
    without = {
        resolved.recipe.micro_batch_tokens: option
        for resolved, option in whole_or_none
        if not resolved.recipe.gradient_checkpointing
    }
    for resolved, all_blocks in whole_or_none:
        recipe = resolved.recipe
        none = without.get(recipe.micro_batch_tokens)
        if (
            not recipe.gradient_checkpointing
            or none is None
            or none.verdict == "fits"
            or all_blocks.verdict != "fits"
            or not covers(recipe, model)  # a trace of each number would take seconds
        ):
            continue
        saved = none.device.high - all_blocks.device.high
        missing = none.device.high - (none.memory.usable_bytes or 0)
        guess = math.ceil(model.n_layer * missing / max(1, saved))

        def option(cut: TrainRecipe, like: ResolvedRecipe = resolved) -> Option:
            return planned(dataclasses.replace(like, recipe=cut))

        fewest = fewest_checkpointed(
            recipe, model.n_layer, lambda cut: option(cut).verdict == "fits", guess=guess
        )
        if fewest is not None:
            yield option(fewest)


def _plans(
    recipe: TrainRecipe, strategy: ShardingStrategy, longest_tokens: int, situation: _Situation
) -> tuple[MemoryPlan, TimePlan | None]:
    """Memory and time of one model, with the GPUs that it is spread over."""
    memory = situation.memory_of(
        recipe, situation.model, situation.profile, strategy, longest_tokens=longest_tokens
    )
    if situation.calibration is not None:
        memory = calibrated_memory(
            memory,
            situation.calibration,
            gpu=situation.profile.gpu,
            strategy=strategy.name,
            recipe=recipe,
            model=situation.model,
        )
    time = situation.time_of(
        recipe,
        situation.model,
        situation.profile,
        strategy,
        situation.data,
        calibration=situation.calibration,
    )
    return memory, time


def _option(
    resolved: ResolvedRecipe,
    level: int,
    strategy: ShardingStrategy,
    placement: Placement,
    memory: MemoryPlan,
    time: TimePlan | None,
    situation: _Situation,
) -> Option:
    profile = situation.profile
    models = num_models(resolved.recipe, situation.data.num_classes)
    at_once = models_per_gpu(placement, num_models=models, num_gpus=profile.num_gpus)
    device = placed_device(memory, placement, models_per_gpu=at_once)
    share = time_share(placement, num_models=models, num_gpus=profile.num_gpus)
    seconds = None
    if time is not None and situation.data_is_known:
        low, expected, high = (
            x * share for x in (time.total.low, time.total.expected, time.total.high)
        )
        seconds = SecondsRange(low=low, expected=expected, high=high)
    if resolved.recipe.placement == "auto":
        resolved = ResolvedRecipe(
            recipe=dataclasses.replace(resolved.recipe, placement=placement),
            origins={**resolved.origins, "placement": plan_origin(profile)},
        )
    return Option(
        resolved=resolved,
        level=level,
        strategy=strategy,
        placement=placement,
        memory=memory,
        device=device,
        verdict=_verdict(memory, device, profile),
        time=time,
        time_share=share,
        seconds=seconds,
    )


def _verdict(memory: MemoryPlan, device: ByteRange, profile: HardwareProfile) -> Verdict:
    if _lacks_host_memory(memory, profile):
        return "does not fit"
    if memory.usable_bytes is None or device.high <= memory.usable_bytes:
        return "fits"
    return "tight" if device.expected <= memory.usable_bytes else "does not fit"


def _lacks_host_memory(memory: MemoryPlan, profile: HardwareProfile) -> bool:
    return profile.gpu is not None and memory.host_bytes > profile.host_memory_bytes


def _best(options: Sequence[Option], situation: _Situation) -> Option | None:
    possible = [x for x in options if x.verdict != "does not fit"]
    best = min(possible, key=functools.partial(_rank, prefer=situation.prefer), default=None)
    if best is None or best.verdict == "tight" or situation.prefer == "memory":
        return best
    # What is as fast as can be told leaves memory free, by steps of a twentieth of what there is.
    alike = [
        x
        for x in possible
        if x.group == best.group
        and x.verdict == "fits"
        and _slowness(x)[0] <= _SAME_SECONDS * _slowness(best)[0]
    ]
    step = max(1, (best.memory.usable_bytes or 0) // 20)
    return min(
        alike,
        key=lambda x: (x.device.expected // step, *_slowness(x)[1:]),
    )


_SAME_SECONDS = 1.01  # a plan of the time cannot tell less apart


def _is_last_resort(strategy: ShardingStrategy, situation: _Situation) -> bool:
    """Whether a strategy is for where nothing else fits: stepping on the host takes several times
    as long, whoever wants it asks for it."""
    return strategy.offloads_optimizer and situation.strategy is None


# Who exchanges weights at every block wants to be this much faster: nothing is published of what
# that costs GPT-2 without NVLink, and a class for each GPU exchanges nothing.
_SHARDS_WANT = 1.15


def _rank(option: Option, prefer: Preference) -> tuple[float, ...]:
    """The smaller the better. Of tight ones the smallest, since they may not fit after all."""
    safety = option.device.high if option.verdict == "tight" else 0
    if prefer == "memory":
        return option.device.expected, option.level, *_slowness(option)
    if prefer == "speed":
        return safety, *_slowness(option), option.level
    strategy = option.strategy
    # Where both fit, ZeRO was slower and larger than DDP (DeepSpeed #2992), whatever is computed.
    zero = strategy.backend == "deepspeed"
    seconds, *others = _slowness(option)
    wanted = seconds * (_SHARDS_WANT if strategy.is_sharded else 1.0)
    return strategy.offloads_optimizer, option.level, safety, zero, wanted, *others


def _slowness(option: Option) -> tuple[float, ...]:
    """Where a GPU's speed is unknown, larger micro batches without recomputation are faster."""
    seconds = 0.0 if option.time is None else option.time.total.expected * option.time_share
    recomputes = 0.0
    if option.recipe.gradient_checkpointing:
        recomputes = option.recipe.checkpointed_layers or math.inf
    return seconds, recomputes, -option.recipe.micro_batch_tokens


def _order_of_rejected(option: Option, prefer: Preference) -> tuple[float, ...]:
    """What fits, best first; then what does not, and of each level what needs least first."""
    if option.verdict != "does not fit":
        return (0, *_rank(option, prefer))
    return 1, option.level, option.device.expected


def _rejected(option: Option, best: Option | None, situation: _Situation) -> Rejected:
    why, reason = _why_not(option, best, situation)
    return Rejected(label=option.label, why=why, reason=reason, option=option)


def _why_not(option: Option, best: Option | None, situation: _Situation) -> tuple[Why, str]:
    """The one reason why an option is not recommended: the first that holds."""
    if option.verdict == "does not fit":
        return "does not fit", shortage(option, situation.profile)
    assert best is not None, "what fits would be recommended"
    if situation.prefer == "memory" and option.device.expected > best.device.expected:
        more = format_bytes(option.device.expected)
        return "larger", f"needs {more}, and {format_bytes(best.device.expected)} is enough"
    if situation.prefer in _FAITHFUL and (
        option.strategy.offloads_optimizer and not best.strategy.offloads_optimizer
    ):
        return "not needed", "steps on the host, and something fits without"
    if situation.prefer in _FAITHFUL and option.level > best.level:
        return "less faithful", "less faithful than what fits"
    if option.verdict == "tight":
        return "tight", f"may need up to {format_bytes(option.device.high)}"
    if situation.prefer in _FAITHFUL:
        if option.strategy.backend == "deepspeed" != best.strategy.backend:
            return "not needed", "ZeRO is for what does not fit without it"
        if option.strategy.is_sharded and not best.strategy.is_sharded:
            return "not needed", f"exchanges weights, and is not {_SHARDS_WANT - 1:.0%} faster"
    return "slower", _slower(option, best)


def shortage(option: Option, profile: HardwareProfile) -> str:
    """What an option needs, and what there is."""
    memory = option.memory
    if _lacks_host_memory(memory, profile):
        needed, there, kind = memory.host_bytes, profile.host_memory_bytes, "host memory"
    else:
        needed, there = option.device.expected, memory.usable_bytes or 0
        kind = "memory" if profile.gpu is None else "GPU memory"
    return f"needs {format_bytes(needed)} of {kind}, and {format_bytes(there)} can be used"


def _slower(option: Option, best: Option) -> str:
    if option.time is None or best.time is None:
        return "is slower"
    seconds = option.time.total.expected * option.time_share
    fastest = best.time.total.expected * best.time_share
    if seconds <= _SAME_SECONDS * fastest:
        return "is not faster by more than 1%"
    if option.seconds is None or best.seconds is None:
        return f"is {seconds / fastest:.2f} times slower"
    return f"takes {format_seconds(seconds)}, against {format_seconds(fastest)}"


def _nearest_change(layers: Sequence[Layer], situation: _Situation) -> NearestChange | None:
    """The first change that helps, of some that are sorted by how much they change."""
    asked = resolve(layers).recipe
    for changed, profile, keys in _changes(layers, asked, situation.profile):
        there = dataclasses.replace(situation, profile=profile, depth="none")
        try:
            options, _ = _candidates(changed, there)
        except UsageError:  # what was given does not go together without what was left out
            continue
        best = _best(options, there)
        if best is not None:
            values = {key: getattr(best.recipe, key) for key in keys}
            words = [typed_option(k, v) for k, v in values.items() if v != getattr(asked, k)]
            if profile is not situation.profile:
                words.append(f"--profile {profile.name}")
            return NearestChange(change=" ".join(words), option=best)
    return None


def _changes(
    layers: Sequence[Layer], asked: TrainRecipe, profile: HardwareProfile
) -> Iterator[tuple[Sequence[Layer], HardwareProfile, Sequence[str]]]:
    """Leave out one pinned choice, then all; cut documents shorter; take a larger machine.

    Each with the recipe keys that it changes.
    """
    given = pinned(layers)
    # What changes rounding alone comes before what changes the result.
    for keys in [(key,) for key in reversed(CHOICES) if key in given] + [tuple(given)]:
        yield _without(layers, keys), profile, keys
    max_length = asked.max_length // 2
    while max_length >= _SHORTEST_MAX_LENGTH:
        shorter = Layer(origin="--max-length", values={"max_length": max_length})
        yield [*layers, shorter], profile, ["max_length"]
        max_length //= 2
    larger = [x for x in PROFILES.values() if _memory_bytes(x) > _memory_bytes(profile)]
    for other in sorted(larger, key=_memory_bytes):
        yield layers, other, ()


_SHORTEST_MAX_LENGTH = 128  # tokens; less of a review or of a news text is another data set


def _memory_bytes(profile: HardwareProfile) -> int:
    return 0 if profile.gpu is None else profile.gpu.memory_bytes * profile.num_gpus


def _without(layers: Sequence[Layer], keys: Sequence[str]) -> list[Layer]:
    return [
        Layer(origin=x.origin, values={k: v for k, v in x.values.items() if k not in keys})
        for x in layers
    ]


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


def typed_option(key: str, value: object) -> str:
    """A recipe value as it is typed after `accel-gpt2 train`.

    >>> typed_option("gradient_checkpointing", False), typed_option("micro_batch_tokens", 1024)
    ('--no-gradient-checkpointing', '--set micro_batch_tokens=1024')
    """
    if key in {"micro_batch_tokens", "checkpointed_layers"}:
        return f"--set {key}={'none' if value is None else value}"
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"
