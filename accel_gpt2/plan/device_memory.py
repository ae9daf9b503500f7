"""What a device holds beside tensors, and what the machine holds in RAM and on disk."""

from dataclasses import dataclass

from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.plan.memory_types import ByteRange, MemoryPhase, MemoryPlan, MemoryTerm, Source
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.units import MIB

# torch asks its own allocator for cuBLAS' workspace, one for the thread of the forward pass and one
# for autograd's (aten/src/ATen/cuda/CublasHandlePool.cpp): ":4096:2:16:8" in KiB, on Hopper 32 MiB.
_CUBLAS_BYTES = 2 * (2 * 4096 + 8 * 16) * 1024
_HOPPER_CUBLAS_BYTES = 2 * 32 * MIB
_HOPPER = ("h100", "h200")

# A process's CUDA context with the libraries' kernels: 290 to 430 MiB were seen, more on Hopper
# (docs/decisions/009-memory.md).
_CONTEXT = ByteRange(low=290 * MIB, expected=400 * MIB, high=450 * MIB)
_HOPPER_CONTEXT = ByteRange(low=430 * MIB, expected=520 * MIB, high=650 * MIB)

# github.com/NVIDIA/nccl/issues/964: for two GPUs, and for more.
_NCCL_BYTES = (544 * MIB, 688 * MIB)

# Reserved over allocated. Segments that grow leave little between tensors; without them, which is
# where `expandable_segments` does not exist, 4% to 31% were seen.
_FRAGMENTATION = (1.0, 1.03, 1.08)

# The part of the memory on the sheet that a process can have: torch tells of 23.65 of 24 GiB on a
# 4090, of 14.74 of 15 on a T4, of 39.39 of 40 on an A100.
_USABLE_FRACTION = 0.98

# A process with torch, transformers and accelerate loaded, before it has a model: as measured in
# `bench` (the least) and in trainings that had read and tokenised their texts (the most).
_PROCESS = ByteRange(low=500 * MIB, expected=650 * MIB, high=800 * MIB)
# CUDA's libraries and the context's mirror, besides.
_CUDA_PROCESS_BYTES = 1800 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSizes:
    """What a training keeps, whole: weights, trained weights and optimizer state, in bytes.

    `num_trained` counts the trained weights, and `final_bytes` are those of the exported model, or
    of its adapter. `paged_bytes` of the optimizer state lie in memory that the driver moves between
    GPU and host; `gathered_bytes` are those of a checkpoint that the first process puts together
    from shares.
    """

    parameters_bytes: int
    trained_bytes: int
    num_trained: int
    optimizer_bytes: int
    final_bytes: int
    paged_bytes: int = 0
    gathered_bytes: int = 0


def assemble_plan(
    phases: tuple[MemoryPhase, ...],
    sizes: StateSizes,
    recipe: TrainRecipe,
    profile: HardwareProfile,
    strategy: ShardingStrategy,
    *,
    source: Source,
) -> MemoryPlan:
    """The plan of a training whose tensors are known, by arithmetic or by a trace.

    Args:
        phases: without what libraries take.
    """
    libraries = _library_terms(profile)
    phases = tuple(
        MemoryPhase(name=phase.name, terms=(*phase.terms, *libraries)) for phase in phases
    )
    allocated = max(phase.bytes for phase in phases)
    reserved = _reserved(allocated, profile)
    return MemoryPlan(
        phases=phases,
        reserved=reserved,
        device=_device(reserved, profile, strategy),
        usable_bytes=_usable_bytes(profile),
        host=_host(allocated, sizes, profile, strategy),
        disk=_disk(sizes, recipe),
        source=source,
    )


def _library_terms(profile: HardwareProfile) -> tuple[MemoryTerm, ...]:
    if profile.gpu is None:
        return ()
    num_bytes = _HOPPER_CUBLAS_BYTES if profile.gpu.name.startswith(_HOPPER) else _CUBLAS_BYTES
    why = "one workspace for each of two threads, out of torch's own allocator"
    return (MemoryTerm(name="cuBLAS workspaces", bytes=num_bytes, why=why),)


def _reserved(allocated: int, profile: HardwareProfile) -> ByteRange:
    if profile.gpu is None:
        return ByteRange(low=allocated, expected=allocated, high=allocated)
    low, expected, high = (round(allocated * factor) for factor in _FRAGMENTATION)
    return ByteRange(low=low, expected=expected, high=high)


def _device(reserved: ByteRange, profile: HardwareProfile, strategy: ShardingStrategy) -> ByteRange:
    if profile.gpu is None:
        besides = _PROCESS
    else:
        hopper = profile.gpu.name.startswith(_HOPPER)
        besides = _HOPPER_CONTEXT if hopper else _CONTEXT
    nccl = 0
    if profile.num_gpus > 1 and strategy.backend != "none":
        nccl = _NCCL_BYTES[0 if profile.num_gpus == 2 else 1]
    return ByteRange(
        low=reserved.low + besides.low,
        expected=reserved.expected + besides.expected + nccl,
        high=reserved.high + besides.high + nccl,
    )


def _usable_bytes(profile: HardwareProfile) -> int:
    if profile.gpu is None:
        return profile.host_memory_bytes
    return round(_USABLE_FRACTION * profile.gpu.memory_bytes)


def _host(
    allocated: int, sizes: StateSizes, profile: HardwareProfile, strategy: ShardingStrategy
) -> tuple[MemoryTerm, ...]:
    processes = 1 if strategy.backend == "none" else max(1, profile.num_gpus)
    each = _PROCESS.expected + (0 if profile.gpu is None else _CUDA_PROCESS_BYTES)
    terms = [
        MemoryTerm(
            name="processes",
            bytes=processes * each,
            why=f"{processes} x torch, transformers and accelerate as they are loaded",
        )
    ]
    if profile.gpu is None:
        terms.append(MemoryTerm(name="training", bytes=allocated, why="it runs here"))
    else:
        # Read on the CPU and then moved; safetensors copies what it writes. One after the other.
        transient = max(processes * sizes.parameters_bytes, sizes.trained_bytes)
        terms.append(
            MemoryTerm(
                name="weights on their way",
                bytes=transient,
                why="read before they go to the GPU, or copied before they go to the disk",
            )
        )
    if sizes.paged_bytes and profile.gpu is not None:
        terms.append(
            MemoryTerm(
                name="paged optimizer state",
                bytes=processes * sizes.paged_bytes,
                why="as much of it as has no room on the GPU",
            )
        )
    if sizes.gathered_bytes:
        terms.append(
            MemoryTerm(
                name="gathered checkpoint",
                bytes=sizes.gathered_bytes,
                why="whole weights and optimizer state, on the first process while it saves",
            )
        )
    if strategy.offloads_optimizer:
        # Master weights and gradients in fp32, and what gradients are added up in:
        # deepspeed/runtime/zero, cpu_offload.
        sums = 4 if strategy.sums_bf16_in_fp32 else sizes.trained_bytes // sizes.num_trained
        terms.append(
            MemoryTerm(
                name="offloaded optimizer",
                bytes=sizes.optimizer_bytes + sizes.num_trained * (4 + 4 + sums),
                why=f"state, fp32 weights, fp32 gradients, and {sums} bytes each for their sums",
            )
        )
    if strategy.offloads_parameters:
        terms.append(
            MemoryTerm(
                name="offloaded parameters",
                bytes=sizes.parameters_bytes,
                why="pinned",
            )
        )
    return tuple(terms)


def num_checkpoints(keep_checkpoints: int) -> int:
    """Of one model on the disk at most: the newest, the best, and one that is being written."""
    return keep_checkpoints + 2


def _disk(sizes: StateSizes, recipe: TrainRecipe) -> tuple[MemoryTerm, ...]:
    count = num_checkpoints(recipe.keep_checkpoints)
    return (
        MemoryTerm(
            name="checkpoints",
            bytes=count * (sizes.trained_bytes + sizes.optimizer_bytes),
            why=f"{count} x weights and optimizer state",
        ),
        MemoryTerm(
            name="final models",
            bytes=sizes.final_bytes,
            why="what transformers or peft loads",
        ),
    )
