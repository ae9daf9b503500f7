"""A memory plan from a trace, where the closed form has none."""

from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.errors import UsageError
from accel_gpt2.plan.device_memory import StateSizes, assemble_plan
from accel_gpt2.plan.memory import micro_batch
from accel_gpt2.plan.memory_types import MemoryPhase, MemoryPlan, MemoryTerm
from accel_gpt2.plan.packing import packs_rows
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.trace.memory import TracedMemory, TraceRequest, trace_memory


def plan_traced(
    recipe: TrainRecipe,
    profile: HardwareProfile,
    strategy: ShardingStrategy,
    *,
    longest_tokens: int,
    num_classes: int = 2,
    vocab_size: int | None = None,
) -> MemoryPlan:
    """What `plan.memory.plan_memory` gives, for any architecture and objective.

    Scores are traced with the head in fp32. Where a GPU multiplies by halves, the evaluation takes
    14 bytes a hidden number more, which is less than any training but a toy's has besides.

    Args:
        longest_tokens: of the longest document, BOS and EOS included.
        num_classes: of the data set.
        vocab_size: of the tokenizer, where it is not the model's own.

    Raises:
        UsageError: for a strategy that shards: what is traced is a whole model.
        UserError: when the step cannot be traced.
    """
    if strategy.backend not in {"none", "ddp"}:
        raise UsageError(
            f"The memory of {recipe.model} under {strategy.name} is not known, because what is "
            "traced is a whole model; plan it for one GPU, or for DDP."
        )
    exchanges = strategy.backend == "ddp" and profile.num_gpus > 1
    world_size = profile.num_gpus if exchanges else 1
    tokens, accumulates = micro_batch(
        recipe,
        longest_tokens=longest_tokens,
        world_size=world_size,
        packed=packs_rows(recipe),
    )
    traced = trace_memory(
        TraceRequest(
            recipe=recipe,
            longest_tokens=longest_tokens,
            micro_batch_tokens=tokens,
            num_micro_batches=2 if accumulates else 1,
            num_classes=num_classes,
            vocab_size=vocab_size,
            device="cpu" if profile.gpu is None else "gpu",
        )
    )
    return assemble_plan(
        tuple(_phase(name, traced, exchanges=exchanges) for name in traced.phases),
        StateSizes(
            parameters_bytes=traced.parameters_bytes,
            num_trained=traced.num_trained_parameters,
            trained_bytes=traced.gradients_bytes,  # one gradient, of its type, for each
            optimizer_bytes=traced.optimizer_bytes,
            final_bytes=(
                traced.parameters_bytes if recipe.finetuning == "full" else traced.gradients_bytes
            ),
        ),
        recipe,
        profile,
        strategy,
        source="trace",
    )


def _phase(name: str, traced: TracedMemory, *, exchanges: bool) -> MemoryPhase:
    trained, count = traced.num_trained_parameters, traced.num_parameters
    held = [
        MemoryTerm(
            name="parameters",
            bytes=traced.parameters_bytes,
            why=f"{count:,} parameters, and the model's buffers",
        ),
        MemoryTerm(
            name="optimizer state",
            bytes=traced.optimizer_bytes,
            why=f"of {trained:,} trained parameters, after a step of the optimizer itself",
        ),
    ]
    if name == "optimizer step":
        held.append(
            MemoryTerm(
                name="gradients",
                bytes=traced.gradients_bytes,
                why=f"of {trained:,} trained parameters",
            )
        )
    rest = MemoryTerm(
        name="the step's own tensors",
        bytes=traced.phases[name] - sum(term.bytes for term in held),
        why="activations, gradients and temporaries at the fullest moment of the traced phase",
    )
    buckets = MemoryTerm(
        name="DDP buckets", bytes=traced.gradients_bytes, why="a copy of every gradient"
    )
    return MemoryPhase(name=name, terms=(*held, rest, *([buckets] if exchanges else [])))
