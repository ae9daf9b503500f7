"""Where the models of the classes are trained: one after another, side by side, or on one base."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from accel_gpt2.plan.memory import ByteRange, MemoryPlan
from accel_gpt2.plan.throughput import SecondsRange
from accel_gpt2.recipe import TrainRecipe

Placement = Literal["sequential", "per-gpu", "concurrent", "shared-base"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSpec:
    """One way; `trained` says whether this version's `train` runs it, else it is predicted only.

    `speed` is of all classes together, against one after another on the same GPU.
    """

    name: Placement
    title: str
    trained: bool
    speed: float
    source: str


_ROWS = (
    PlacementSpec(
        name="sequential",
        title="one class after another",
        trained=True,
        speed=1.0,
        source="one model at a time has the whole machine",
    ),
    PlacementSpec(
        name="per-gpu",
        title="one class per GPU",
        trained=False,
        speed=1.0,
        source="processes that exchange nothing; more classes than GPUs queue",
    ),
    PlacementSpec(
        name="concurrent",
        title="all classes at once on each GPU",
        trained=False,
        # They take turns on the same multiprocessors.
        speed=0.96,
        source="prismaquant #283: two processes on one GPU without MPS, 0.96 of one after another",
    ),
    PlacementSpec(
        name="shared-base",
        title="all classes' adapters on one base",
        trained=False,
        speed=1.0,
        source="micro batches of the classes take turns on a base that is resident once",
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


def classes_per_gpu(placement: Placement, *, num_classes: int, num_gpus: int) -> int:
    """How many models one GPU holds at the same time.

    >>> classes_per_gpu("concurrent", num_classes=4, num_gpus=1)
    4
    >>> classes_per_gpu("per-gpu", num_classes=4, num_gpus=2)
    1
    """
    if placement in {"sequential", "per-gpu"}:
        return 1
    return -(-num_classes // max(1, num_gpus))


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
    if models > 1 and num_gpus > 0 and recipe.finetuning != "full":
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


def placed_seconds(
    total: SecondsRange, placement: Placement, *, num_classes: int, num_gpus: int
) -> SecondsRange:
    """The time of all classes, from that of all classes one after another.

    Args:
        total: with the GPUs that one class trains on: all of them for `sequential`, else one.

    >>> one_gpu = SecondsRange(low=8.0, expected=10.0, high=12.0)
    >>> placed_seconds(one_gpu, "per-gpu", num_classes=4, num_gpus=2).expected
    5.0
    >>> placed_seconds(one_gpu, "per-gpu", num_classes=3, num_gpus=2).expected  # two rounds of three
    6.666666666666666
    """
    share = 1.0
    if placement != "sequential":
        rounds = -(-num_classes // max(1, num_gpus))
        share = rounds / num_classes / PLACEMENTS[placement].speed
    return SecondsRange(
        low=total.low * share, expected=total.expected * share, high=total.high * share
    )
