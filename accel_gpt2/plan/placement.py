"""Where the models of the classes are trained: one after another, side by side, or on one base."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from accel_gpt2.plan.device_memory import num_checkpoints
from accel_gpt2.plan.memory_types import ByteRange, MemoryPlan, MemoryTerm
from accel_gpt2.recipe import TrainRecipe

Placement = Literal["sequential", "per-gpu", "concurrent", "shared-base"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSpec:
    """One way. `speed` is of all classes together, against one after another on the same GPU."""

    name: Placement
    title: str
    speed: float
    source: str


_ROWS = (
    PlacementSpec(
        name="sequential",
        title="one class after another",
        speed=1.0,
        source="one model at a time has the whole machine",
    ),
    PlacementSpec(
        name="per-gpu",
        title="one class per GPU",
        speed=1.0,
        source="processes that exchange nothing; more classes than GPUs queue",
    ),
    PlacementSpec(
        name="concurrent",
        title="all classes at once on each GPU",
        # They take turns on the same multiprocessors.
        speed=0.96,
        source="prismaquant #283: two processes on one GPU without MPS, 0.96 of one after another",
    ),
    PlacementSpec(
        name="shared-base",
        title="all classes' adapters on one base",
        # Stacked small micro batches are 1.3x as fast, where a start finds them so.
        speed=1.0,
        source="docs/benchmarks/2026-11-23-shared-base.md: micro batches in turn, 1.0 of one after "
        "another",
    ),
)

PLACEMENTS: Mapping[Placement, PlacementSpec] = MappingProxyType({row.name: row for row in _ROWS})

# What each class has of its own where all of them stand on one frozen base.
_OF_AN_ADAPTER = frozenset({"adapters", "gradients", "optimizer state"})


def num_models(recipe: TrainRecipe, num_classes: int) -> int:
    """How many models are trained: one per class, or one of all text.

    >>> num_models(TrainRecipe(), 4), num_models(TrainRecipe(objective="unconditional"), 4)
    (4, 1)
    """
    return 1 if recipe.objective in {"classification", "unconditional", "hybrid"} else num_classes


def models_per_gpu(placement: Placement, *, num_models: int, num_gpus: int) -> int:
    """How many models one GPU holds at the same time, or the RAM of a machine without one.

    >>> models_per_gpu("concurrent", num_models=4, num_gpus=1)
    4
    >>> models_per_gpu("per-gpu", num_models=4, num_gpus=2)
    1
    >>> models_per_gpu("per-gpu", num_models=4, num_gpus=0)  # at most: one for each core
    4
    >>> models_per_gpu("shared-base", num_models=4, num_gpus=2)
    4
    """
    if placement == "sequential" or (placement == "per-gpu" and num_gpus > 0):
        return 1
    if placement == "shared-base":
        return num_models  # one process
    return -(-num_models // max(1, num_gpus))


def applicable_placements(
    recipe: TrainRecipe, *, num_classes: int, num_gpus: int
) -> tuple[Placement, ...]:
    """The ways that make sense for this many models and GPUs, `sequential` first.

    >>> applicable_placements(TrainRecipe(), num_classes=2, num_gpus=2)
    ('sequential', 'per-gpu')
    >>> applicable_placements(TrainRecipe(finetuning="lora"), num_classes=4, num_gpus=1)
    ('sequential', 'concurrent', 'shared-base')
    """
    models = num_models(recipe, num_classes)
    found: list[Placement] = ["sequential"]
    if models > 1 and num_gpus > 1:
        found.append("per-gpu")
    if models > num_gpus > 0:
        found.append("concurrent")
    if models > 1 and num_gpus == 1 and recipe.finetuning != "full":  # of several it uses one
        found.append("shared-base")
    return tuple(found)


def placed_device(memory: MemoryPlan, placement: Placement, *, models_per_gpu: int) -> ByteRange:
    """What one GPU needs with all that it holds at once, from the plan of a single model.

    Processes side by side share nothing, not even the CUDA context. On a shared base a further
    class brings its adapter, with its gradients and optimizer state.
    """
    device = memory.device
    if placement == "shared-base":
        own = sum(term.bytes for term in memory.terms if term.name in _OF_AN_ADAPTER)
        more = (models_per_gpu - 1) * own
        return ByteRange(
            low=device.low + more, expected=device.expected + more, high=device.high + more
        )
    return ByteRange(
        low=device.low * models_per_gpu,
        expected=device.expected * models_per_gpu,
        high=device.high * models_per_gpu,
    )


def num_processes(placement: Placement, *, num_models: int, num_gpus: int) -> int:
    """How many models have a process of their own at the same moment.

    >>> [num_processes(x, num_models=4, num_gpus=1) for x in ("sequential", "concurrent")]
    [1, 4]
    >>> num_processes("per-gpu", num_models=4, num_gpus=2)
    2
    """
    if placement in {"sequential", "shared-base"}:
        return 1
    per_gpu = models_per_gpu(placement, num_models=num_models, num_gpus=num_gpus)
    return min(num_models, per_gpu * max(1, num_gpus))


def placed_host(memory: MemoryPlan, processes: int) -> tuple[MemoryTerm, ...]:
    """RAM of a machine where so many processes each train a model: they share none of it."""
    if processes == 1:
        return memory.host
    return tuple(
        MemoryTerm(name=term.name, bytes=processes * term.bytes, why=f"{processes} x: {term.why}")
        for term in memory.host
    )


def run_disk(
    memory: MemoryPlan, *, keep_checkpoints: int, num_models: int, num_writing: int
) -> tuple[MemoryTerm, ...]:
    """What a run's models leave on the disk together, from the plan of one of them.

    Each keeps its newest `keep_checkpoints` and its best one; `num_writing` of them may have one
    more that is being written.
    """
    one = {term.name: term.bytes for term in memory.disk}
    checkpoint_bytes = one["checkpoints"] // num_checkpoints(keep_checkpoints)
    count = num_models * (num_checkpoints(keep_checkpoints) - 1) + num_writing
    return (
        MemoryTerm(
            name="checkpoints",
            bytes=count * checkpoint_bytes,
            why=f"{count} x weights and optimizer state: the newest and the best of each model, "
            f"and {num_writing} being written",
        ),
        MemoryTerm(
            name="final models",
            bytes=num_models * one["final models"],
            why=f"{num_models} x what transformers or peft loads",
        ),
    )


def time_share(placement: Placement, *, num_models: int, num_gpus: int) -> float:
    """The time of all models, over that of one after another on the GPUs that each of them uses.

    >>> time_share("per-gpu", num_models=4, num_gpus=2)
    0.5
    >>> round(time_share("per-gpu", num_models=3, num_gpus=2), 3)  # two rounds in place of three
    0.667
    >>> round(time_share("concurrent", num_models=4, num_gpus=1), 3)
    1.042
    """
    if placement == "sequential":
        return 1.0
    used = 1 if placement == "shared-base" else max(1, num_gpus)
    rounds = -(-num_models // used)
    return rounds / num_models / PLACEMENTS[placement].speed
