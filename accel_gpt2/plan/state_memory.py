"""What weights, gradients and optimizer state take, however many tokens go through the model."""

import functools
import math

from accel_gpt2.catalog.optimizers import OPTIMIZERS
from accel_gpt2.plan.device_memory import StateSizes
from accel_gpt2.plan.gpt2_step import Gpt2Step, Shapes, term
from accel_gpt2.plan.memory_types import MemoryTerm
from accel_gpt2.recipe import Optimizer

# NF4 with double quantisation: half a byte a weight, an 8-bit scale for each 64, and an fp32 scale
# of those for each 256 (Dettmers et al. 2023, section 3).
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

# LLM.int8(): a byte a weight, and an fp32 scale for each of the 9 d outputs of a block.
_INT8_SCALES = 4 * 9


def resident(step: Gpt2Step) -> tuple[MemoryTerm, ...]:
    """Weights, optimizer state, and what else outlives a step."""
    terms = [_parameters(step)]
    if not step.full:
        terms.append(
            term(
                "adapters",
                step.num_adapter_parameters * step.weight,
                f"{step.num_adapter_parameters:,} LoRA weights x {step.weight} bytes",
            )
        )
    terms += _master_weights(step)
    terms.append(_optimizer_state(step))
    if step.strategy.backend == "ddp":
        terms.append(
            term(
                "DDP buckets",
                step.num_trained * step.weight,
                "a second copy of the gradients, in which they are exchanged",
            )
        )
    if step.strategy.backend == "deepspeed":
        terms.append(_deepspeed_buckets(step))
    if step.strategy.offloads_optimizer and step.strategy.zero_stage < 3:
        # stage_1_and_2.py: temp_grad_buffer_for_gpu_offload.
        shape, _ = step.trained_shapes[0]
        terms.append(
            term(
                "offload buffer",
                math.prod(shape) * step.weight,
                f"the gradient of the largest tensor, {math.prod(shape):,} x {step.weight} "
                "bytes, on its way to host memory",
            )
        )
    terms.append(
        term(
            "token ids",
            17 * step.tokens,
            f"{step.tokens:,} tokens x (8 for the input + 8 for the target + 1 byte)",
        )
    )
    return tuple(terms)


def _parameters(step: Gpt2Step) -> MemoryTerm:
    sharded = step.strategy.shards_parameters
    width = 4 if step.strategy.backend == "fsdp2" and not step.plain_pure else step.weight
    count = step.model.num_parameters
    share = f" / {step.world_size} processes" if sharded else ""
    if step.recipe.finetuning != "qlora":
        if step.strategy.offloads_parameters:
            # deepspeed/runtime/zero/partition_parameters.py: gathered one module at a time.
            return term(
                "parameters",
                width * step.head,
                f"the largest module, {step.head:,} x {width} bytes; the rest is in host memory",
            )
        return term(
            "parameters",
            step.shard(width * count, sharded=sharded),
            f"{count:,} x {width} bytes{share}",
        )
    quantized = step.model.n_layer * step.block_matrices
    each = _NF4_BYTES
    if step.recipe.quantization == "int8":
        each = 1 + _INT8_SCALES * step.model.n_embd / step.block_matrices
    return term(
        "parameters",
        quantized * each + (count - quantized) * width,
        f"{quantized:,} in {step.recipe.quantization} x {each:.3f} bytes + the other "
        f"{count - quantized:,} x {width}",
    )


def _master_weights(step: Gpt2Step) -> list[MemoryTerm]:
    # deepspeed/runtime/zero/stage_1_and_2.py and stage3.py: single_partition_of_fp32_groups,
    # also where the model is fp32 itself.
    if step.strategy.backend != "deepspeed" or step.strategy.offloads_optimizer:
        return []
    return [
        term(
            "master weights",
            step.shard(4 * step.num_trained, sharded=True),
            f"{step.num_trained:,} x 4 bytes / {step.world_size} processes, DeepSpeed's own",
        )
    ]


def _kahan(step: Gpt2Step) -> bool:
    return step.plain_pure and step.recipe.bf16_rounding == "kahan"


def _optimizer_state(step: Gpt2Step) -> MemoryTerm:
    if step.strategy.offloads_optimizer:
        return term("optimizer state", 0, "in host memory")
    paged = paged_bytes(step)
    total = optimizer_state_bytes(step) - paged
    sharded = step.strategy.shards_optimizer
    share = f" / {step.world_size} processes" if sharded else ""
    why = f"{step.recipe.optimizer}, {step.num_trained:,} parameters{share}"
    if _kahan(step):
        why += ", with 2 bytes each of what rounding left over"
    if paged:
        why += "; the rest is paged, and leaves to the host what has no room here"
    elif OPTIMIZERS[step.recipe.optimizer].paged_tensor_elements and not step.on_gpu:
        why += "; without a GPU nothing is paged"
    return term("optimizer state", step.shard(total, sharded=sharded), why)


def optimizer_state_bytes(step: Gpt2Step) -> float:
    """Of all processes together."""
    moments = _moments_bytes(step.recipe.optimizer, step.trained_shapes, step.plain_pure)
    return moments + (2 * step.num_trained if _kahan(step) else 0)


@functools.cache
def _moments_bytes(optimizer: Optimizer, shapes: Shapes, bf16: bool) -> float:
    spec = OPTIMIZERS[optimizer]
    return sum(spec.state_bytes(shape, bf16=bf16) * count for shape, count in shapes)


def paged_bytes(step: Gpt2Step) -> float:
    """Of the optimizer state, what the driver may move to the host."""
    if not step.on_gpu:
        return 0.0
    return _paged_bytes(step.recipe.optimizer, step.trained_shapes, step.plain_pure)


@functools.cache
def _paged_bytes(optimizer: Optimizer, shapes: Shapes, bf16: bool) -> float:
    spec = OPTIMIZERS[optimizer]
    return sum(spec.paged_bytes(shape, bf16=bf16) * count for shape, count in shapes)


def _deepspeed_buckets(step: Gpt2Step) -> MemoryTerm:
    # Two: one is filled while the other is exchanged (overlap_comm). Stage 3 has one to fill, and
    # as much of the weights ahead (stage3_prefetch_bucket_size).
    elements = 2 * step.strategy.bucket_elements
    # Stage 1 exchanges the sums of all micro batches, the others each one's gradients.
    width = 4 if step.strategy.zero_stage == 1 else step.weight
    return term("exchange buckets", elements * width, f"{elements:,} x {width} bytes")


def sizes(step: Gpt2Step) -> StateSizes:
    """What the training keeps, whole, as it is read and written."""
    trained = step.num_trained * step.weight
    whole = step.model.num_parameters * step.weight
    gathered = 0.0
    if step.strategy.is_sharded:
        width = 2 if step.plain_pure else 4
        gathered = step.num_trained * width + optimizer_state_bytes(step)
    return StateSizes(
        parameters_bytes=whole,
        trained_bytes=trained,
        num_trained=step.num_trained,
        optimizer_bytes=round(optimizer_state_bytes(step)),
        paged_bytes=round(paged_bytes(step)),
        gathered_bytes=round(gathered),
        final_bytes=whole if step.full else trained,
    )


def gradient_bytes(step: Gpt2Step) -> float:
    """Of all trained parameters, as long as a process holds them."""
    in_fp32 = step.strategy.backend == "fsdp2" or (
        # Offloaded, the sums are in host memory.
        step.strategy.sums_bf16_in_fp32 and not step.strategy.offloads_optimizer
    )
    whole = step.num_trained * (4 if in_fp32 and not step.plain_pure else step.weight)
    return step.shard(whole, sharded=step.strategy.shards_gradients)


def held_gradients(step: Gpt2Step) -> list[MemoryTerm]:
    """The gradients of earlier micro batches."""
    if not step.accumulates:
        return []
    return [all_gradients(step, "of the step's earlier micro batches")]


def all_gradients(step: Gpt2Step, when: str) -> MemoryTerm:
    """The gradients of all trained parameters."""
    return term("gradients", gradient_bytes(step), f"{step.num_trained:,} parameters, {when}")


def gathered(step: Gpt2Step, *, blocks: int) -> list[MemoryTerm]:
    """Whole weights of the units in use, where each process has a share only."""
    if not step.strategy.shards_parameters:
        return []
    d = step.model.n_embd
    root = step.head + step.model.n_positions * d + 2 * d
    elements = root + blocks * (step.block_matrices + 13 * d)
    return [
        term(
            "gathered weights",
            elements * step.compute,
            f"embeddings, head and {blocks} blocks, {elements:,} x {step.compute} bytes",
        )
    ]


def exchanged(step: Gpt2Step, *, blocks: int) -> list[MemoryTerm]:
    """Whole gradients on their way into shares: of a block, or of what is none, under FSDP2, and a
    copy of the full bucket under ZeRO-3."""
    if step.strategy.zero_stage == 3:
        elements = step.strategy.bucket_elements  # coalesced_collectives.py: torch.cat
        why = f"{elements:,} x {step.weight} bytes"
        return [term("exchanged gradients", elements * step.weight, why)]
    if step.strategy.backend != "fsdp2" or not step.full:
        return []
    d = step.model.n_embd
    elements = blocks * (step.block_matrices + 13 * d)
    if not blocks:
        elements = step.head + step.model.n_positions * d + 2 * d
    width = 2 if step.plain_pure else 4  # fsdp/_fully_shard/_fsdp_collectives.py, foreach_reduce
    return [term("exchanged gradients", elements * width, f"{elements:,} x {width} bytes")]
