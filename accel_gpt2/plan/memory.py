"""What a training needs in memory: on the device in each phase of a step, in RAM and on disk.

Exact arithmetic for GPT-2 language models (`covers`); every other architecture is traced
(`accel_gpt2.trace`), and gives a `MemoryPlan` too. Bytes everywhere.
"""

from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.plan.device_memory import StateSizes, assemble_plan
from accel_gpt2.plan.gpt2_memory import phases
from accel_gpt2.plan.gpt2_step import PROJECTIONS, Gpt2Step
from accel_gpt2.plan.memory_types import ByteRange, MemoryPhase, MemoryPlan, MemoryTerm, Verdict
from accel_gpt2.plan.packing import attends_in_groups, packs_rows
from accel_gpt2.plan.state_memory import sizes
from accel_gpt2.recipe import TrainRecipe

__all__ = [
    "ByteRange",
    "MemoryPhase",
    "MemoryPlan",
    "MemoryTerm",
    "StateSizes",
    "Verdict",
    "assemble_plan",
    "covers",
    "micro_batch",
    "plan_memory",
]


def covers(recipe: TrainRecipe, model: ModelSpec) -> bool:
    """Whether the closed form knows this training; else the trace is asked.

    >>> from accel_gpt2.catalog.models import MODELS
    >>> covers(TrainRecipe(), MODELS["gpt2"]), covers(TrainRecipe(), MODELS["roberta-base"])
    (True, False)
    """
    return (
        model.model_type == "gpt2"
        and recipe.objective in {"generative", "unconditional"}
        and all(
            any(path == target or path.endswith(f".{target}") for path in PROJECTIONS)
            for target in recipe.lora_target_modules
        )
    )


def micro_batch(
    recipe: TrainRecipe, *, longest_tokens: int, world_size: int = 1, packed: bool = False
) -> tuple[int, bool]:
    """The largest micro batch in tokens, padding included, and whether a step may have more than
    one.

    >>> micro_batch(TrainRecipe(micro_batch_tokens=4096, global_batch_tokens=8192),
    ...             longest_tokens=1024)
    (4096, True)
    >>> micro_batch(TrainRecipe(micro_batch_tokens=4096, global_batch_size=2,
    ...             global_batch_tokens=None), longest_tokens=1024)
    (2046, False)
    >>> micro_batch(TrainRecipe(micro_batch_tokens=10240, global_batch_tokens=8192),
    ...             longest_tokens=1024, packed=True)
    (8192, False)
    """
    length = longest_tokens - 1  # what goes in: all but the last token
    if recipe.global_batch_size is not None:
        whole = recipe.global_batch_size * length
        one_each = recipe.global_batch_size <= world_size
    elif packed:
        whole = max(recipe.global_batch_tokens or 0, length)
        one_each = False
    else:  # padded to one long document, a batch of short ones may be of any size
        return max(length, recipe.micro_batch_tokens), True
    # Each process's share: whole documents are dealt out.
    share = whole if world_size == 1 else min(whole, whole // world_size + length)
    tokens = share if whole <= recipe.micro_batch_tokens else recipe.micro_batch_tokens
    return max(length, tokens), share > recipe.micro_batch_tokens and not one_each


def plan_memory(
    recipe: TrainRecipe,
    model: ModelSpec,
    profile: HardwareProfile,
    strategy: ShardingStrategy,
    *,
    longest_tokens: int,
    stock_loss: bool = False,
) -> MemoryPlan:
    """Every term of every phase, in well under a millisecond.

    Args:
        profile: the machine; without a GPU the device is its RAM.
        longest_tokens: of the longest document, BOS and EOS included.
        stock_loss: transformers' own loss under accelerate, which is what others train with, in
            place of ours.
    """
    world_size = 1 if strategy.backend == "none" else max(1, profile.num_gpus)
    tokens, accumulates = micro_batch(
        recipe,
        longest_tokens=longest_tokens,
        world_size=world_size,
        packed=packs_rows(recipe) and not stock_loss,
    )
    step = Gpt2Step(
        recipe=recipe,
        model=model,
        strategy=strategy,
        world_size=world_size,
        tokens=tokens,
        length=longest_tokens - 1,
        accumulates=accumulates,
        stock_loss=stock_loss,
        on_gpu=profile.gpu is not None,
        attends_in_groups=attends_in_groups(recipe, profile.gpu) and not stock_loss,
        scores_by_halves=profile.gpu is not None and profile.gpu.multiplies_by_halves,
    )
    return assemble_plan(
        phases(step),
        sizes(step),
        recipe,
        profile,
        strategy,
        source="closed form",
    )
