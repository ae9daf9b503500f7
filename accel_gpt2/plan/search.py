"""Which recipe to train: every candidate is planned, and what is not recommended has its reason.

What was given (options, file, environment) is pinned; what is free is searched, at the global batch
of the recipe, so that every machine trains the same model.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from accel_gpt2.catalog.models import MODELS, ModelSpec
from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.errors import UsageError
from accel_gpt2.plan.calibration import Calibration, Quantity, Residual, calibrated_memory
from accel_gpt2.plan.candidates import (
    Preference,
    cuts,
    fewest_checkpointed,
    levels,
    pinned,
    plan_origin,
    spreads,
)
from accel_gpt2.plan.changes import changes, typed_option
from accel_gpt2.plan.data import DataStatistics, dataset_statistics
from accel_gpt2.plan.memory import MemoryPlan, covers, plan_memory
from accel_gpt2.plan.placement import (
    PLACEMENTS,
    Placement,
    models_per_gpu,
    num_models,
    num_processes,
    placed_device,
    placed_host,
    run_disk,
    time_share,
)
from accel_gpt2.plan.ranking import (
    FAITHFUL,
    best_option,
    lacks_host_memory,
    order_of_rejected,
    rejection,
    verdict_of,
)
from accel_gpt2.plan.run_plan import NearestChange, Option, Rejected, RunPlan, Why
from accel_gpt2.plan.support import refusal
from accel_gpt2.plan.throughput import SecondsRange, TimePlan, plan_time
from accel_gpt2.recipe import Layer, ResolvedRecipe, TrainRecipe
from accel_gpt2.recipe.resolving import resolve

__all__ = ["Depth", "NearestChange", "Option", "Rejected", "RunPlan", "plan_run"]

# Where faithfulness comes first, what is planned below the first level that fits: all of it, what
# leaves the host's memory alone, or nothing.
Depth = Literal["all", "some", "none"]


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
        first = refused[0]
        instead = f"; give {first.instead}" if first.instead else ""
        raise UsageError(
            f"{situation.model.name} cannot be trained as asked: {first.reason}{instead}."
        )
    best = best_option(options, situation.prefer)
    others = sorted(
        (x for x in options if x is not best),
        key=functools.partial(order_of_rejected, prefer=prefer),
    )
    return RunPlan(
        asked=asked,
        profile=profile,
        model=situation.model,
        data=data,
        prefer=prefer,
        recommended=best,
        smallest=min(
            options, key=lambda x: (lacks_host_memory(x.host_bytes, profile), x.device.expected)
        ),
        rejected=(*(rejection(x, best, prefer=prefer, profile=profile) for x in others), *refused),
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

    def refuse(label: str, why: Why, reason: str, instead: str = "") -> None:
        rejected = Rejected(label=label, why=why, reason=reason, option=None, instead=instead)
        refused.append(rejected)

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
                label = f"{level.label}, {spread}"
                refuse(label, "unsupported", refused_for.reason, refused_for.instead)
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
            found = _planned_cuts(cut, planned, everything=situation.depth == "all")
            options += (option for _, option in found)
            if "checkpointed_layers" not in pinned(layers):
                options += _partly_checkpointed(found, planned, situation.model)
        best = best_option(options, situation.prefer)
        fitted = (
            situation.prefer in FAITHFUL
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
    recipe = resolved.recipe
    if placement == "shared-base":  # whose rows may be padded
        recipe = dataclasses.replace(recipe, placement=placement)
    key = strategy.name, recipe
    if key not in plans:
        plans[key] = _plans(recipe, strategy, longest_tokens, situation)
    memory, time = plans[key]
    return _option(resolved, level, strategy, placement, memory, time, situation)


def _planned_cuts(
    cut: Sequence[ResolvedRecipe],
    planned: Callable[[ResolvedRecipe], Option],
    *,
    everything: bool,
) -> list[tuple[ResolvedRecipe, Option]]:
    """Each cut with its option. Unless everything is wanted, a micro batch larger than one that
    does not fit is left out."""
    found = []
    for _, by_tokens in itertools.groupby(cut, key=lambda x: x.recipe.gradient_checkpointing):
        # The largest may be a whole batch, which holds no other one's gradients meanwhile.
        *smaller, largest = by_tokens
        for resolved in smaller:
            option = planned(resolved)
            found.append((resolved, option))
            if option.verdict == "does not fit" and not everything:
                break
        found.append((largest, planned(largest)))
    return found


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
        if (
            not without
            or not recipe.gradient_checkpointing
            or all_blocks.verdict != "fits"
            or not covers(recipe, model)  # a trace of each number would take seconds
        ):
            continue
        none = without.get(recipe.micro_batch_tokens)
        if none is None:  # left out
            uncut = dataclasses.replace(recipe, gradient_checkpointing=False)
            none = planned(dataclasses.replace(resolved, recipe=uncut))
        if none.verdict == "fits":
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
    processes = num_processes(placement, num_models=models, num_gpus=profile.num_gpus)
    host = placed_host(memory, processes)
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
        host=host,
        disk=run_disk(
            memory,
            keep_checkpoints=resolved.recipe.keep_checkpoints,
            num_models=models,
            num_writing=processes,
        ),
        verdict=verdict_of(memory, device, sum(term.bytes for term in host), profile),
        time=time,
        time_share=share,
        seconds=seconds,
    )


def _is_last_resort(strategy: ShardingStrategy, situation: _Situation) -> bool:
    """Whether a strategy is for where nothing else fits: stepping on the host takes several times
    as long, whoever wants it asks for it."""
    return strategy.offloads_optimizer and situation.strategy is None


def _nearest_change(layers: Sequence[Layer], situation: _Situation) -> NearestChange | None:
    """The first change that helps, of some that are sorted by how much they change."""
    asked = resolve(layers).recipe
    for changed, profile, keys in changes(layers, asked, situation.profile):
        there = dataclasses.replace(situation, profile=profile, depth="none")
        try:
            options, _ = _candidates(changed, there)
        except UsageError:  # what was given does not go together without what was left out
            continue
        best = best_option(options, there.prefer)
        if best is not None:
            values = {key: getattr(best.recipe, key) for key in keys}
            words = [typed_option(k, v) for k, v in values.items() if v != getattr(asked, k)]
            if profile is not situation.profile:
                words.append(f"--profile {profile.name}")
            return NearestChange(change=" ".join(words), option=best)
    return None
