"""The seconds of one optimizer step, and of scoring a token, by what they wait for."""

from collections.abc import Sequence
from dataclasses import dataclass

from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.catalog.optimizers import OPTIMIZERS
from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.plan.data import DataStatistics
from accel_gpt2.plan.device_speed import Device, matmul_seconds
from accel_gpt2.plan.flops import forward_flops
from accel_gpt2.plan.packing import attends_in_groups
from accel_gpt2.plan.steps import StepPlan
from accel_gpt2.recipe import TrainRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeTerm:
    """One part of a duration; `why` is one sentence with its formula and the source."""

    name: str
    seconds: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Bytes that all kernels but matrix products read and write, forward and backward.

    `layer_bytes` for each token, block and unit of n_embd; `head_bytes` for each token and word of
    the vocabulary.
    """

    layer_bytes: float
    head_bytes: float


# Counted kernel by kernel on transformers' GPT-2 with gelu_pytorch_tanh and without dropout
# (benchmarks/kernel_bytes.py), and what dropout and gelu_new, with its powers, add. Of the chunked
# loss, by the lines of train/loss.py.
_KERNELS = {
    "no": Kernels(layer_bytes=228, head_bytes=24),
    "fp16": Kernels(layer_bytes=190, head_bytes=36),
    "bf16": Kernels(layer_bytes=190, head_bytes=36),
    "pure_bf16": Kernels(layer_bytes=114, head_bytes=36),
}
_DROPOUT_BYTES = {"no": 80, "fp16": 40, "bf16": 40, "pure_bf16": 40}
# Packed rows laid out in groups: query, key and value filled with zeros and written, the output
# gathered, and the same for their gradients.
_GROUPS_BYTES = {"no": 120, "fp16": 60, "bf16": 60, "pure_bf16": 60}
_GROUPS_LAUNCHES = 1.5  # some 40 kernels more to the 75 of a block: counted for seven groups
_PLAIN_GELU_BYTES = {"no": 656, "fp16": 736, "bf16": 736, "pure_bf16": 328}
_FORWARD_SHARE = 1 / 3  # of the bytes

# What a micro batch moves however few tokens it has, bytes per weight. Reads by the two products of
# forward and backward; the cast of fp32 weights to 16 bits; a gradient written, made fp32 and,
# from the second micro batch on, added to the first.
_READ_BYTES = {"no": 8, "fp16": 10, "bf16": 10, "pure_bf16": 4}
_GRADIENT_BYTES = {"no": 4, "fp16": 8, "bf16": 8, "pure_bf16": 2}
_ADDED_BYTES = {"no": 12, "fp16": 12, "bf16": 12, "pure_bf16": 6}
# What a step moves, bytes per trained weight. The norm reads a gradient, clipping scales it (12);
# fused AdamW reads four fp32 numbers and writes three (28).
_CLIP_BYTES = {"no": 12, "fp16": 12, "bf16": 12, "pure_bf16": 6}
_UPDATE_BYTES = {
    "adamw": 28, "adamw_8bit": 16, "adamw_paged": 28, "adamw_8bit_paged": 16, "adafactor": 40,
}  # fmt: skip
# DoRA adds a matrix to each frozen one and takes the norms of its rows, in every forward pass:
# the product written, a multiple of it, the sum, and what they are read for.
_DORA_BYTES = 36
_PURE_BF16_UPDATE_BYTES = 60  # train/bf16.py: chunks in fp32, rounded by a random number each

# Bytes per second between GPUs and between a GPU and its host, in one direction. PCIe 4.0 x16
# moves 32e9 on paper; through host memory, as GeForce cards must, a third of it is left.
_LINK_BYTES_PER_SECOND = {"none": 10e9, "pcie": 10e9, "nvlink": 200e9}
_HOST_LINK_BYTES_PER_SECOND = 12e9
_HOST_BYTES_PER_SECOND = 20e9  # DeepSpeedCPUAdam streams through RAM: two channels of DDR5, half
_HIDDEN_SHARE = 0.9  # of communication that the backward pass can hide, if it is long enough

# Accelerate's overhead (0.55 ms), clipping, the optimizer's launches, one wait for the device.
_HOST_SECONDS_PER_STEP = 2e-3
# bitsandbytes launches a kernel per tensor, torch's Adafactor some fifteen.
_HOST_SECONDS_PER_TENSOR = {
    "adamw": 0.0, "adamw_8bit": 5e-5, "adamw_paged": 5e-5, "adamw_8bit_paged": 5e-5,
    "adafactor": 2e-4,
}  # fmt: skip
_TENSORS_PER_LAYER = 12


def kernel_seconds(tokens: float, model: ModelSpec, kernels: Kernels, device: Device) -> float:
    """Time of all other kernels: their bytes over the bandwidth."""
    per_token = (
        kernels.layer_bytes * model.n_layer * model.n_embd + kernels.head_bytes * model.vocab_size
    )
    return tokens * per_token / device.bytes_per_second


def time_of_step(
    recipe: TrainRecipe,
    model: ModelSpec,
    device: Device,
    strategy: ShardingStrategy,
    profile: HardwareProfile,
    data: DataStatistics,
    steps: StepPlan,
    world_size: int,
) -> Sequence[TimeTerm]:
    """One optimizer step on one of `world_size` equal devices, by what it waits for."""
    precision = recipe.mixed_precision
    adapters = recipe.finetuning != "full"
    in_groups = attends_in_groups(recipe, profile.gpu)
    passes = (
        data.num_classes if recipe.objective == "hybrid" else 1
    )  # models a document goes through
    valid = steps.tokens / world_size * passes
    padded = valid / steps.padded_share
    forward = forward_flops(
        n_layer=model.n_layer,
        n_embd=model.n_embd,
        vocab_size=model.vocab_size,
        context_tokens=data.mean_context_tokens,
    )
    attention = forward.attention * (2 if model.model_type == "roberta" else 1)  # both sides
    head = forward.head * {"classification": 0.0, "masked_lm": recipe.mask_fraction}.get(
        recipe.objective, 1.0
    )
    # Of r x (in + out) weights at each of the four projections: 16 r d for each block.
    adapter = 2.0 * 16 * recipe.lora_rank * model.n_embd * model.n_layer if adapters else 0.0
    times = 2 if adapters else 3  # forward and one or both halves of backward
    again = 0.0
    if recipe.gradient_checkpointing:
        again = (recipe.checkpointed_layers or model.n_layer) / model.n_layer

    def products(tokens: float, flops: float) -> float:
        return matmul_seconds(tokens, flops, model.n_embd, device)

    blocks_seconds = products(padded, times * forward.blocks + 3 * adapter)
    head_seconds = products(valid, times * head)
    attention_seconds = products(padded, 3 * attention)
    kernels = _kernels(recipe, head_share=head / forward.head, in_groups=in_groups)
    elementwise_seconds = kernel_seconds(padded, model, kernels, device)
    again_seconds = again * (
        products(padded, forward.blocks + attention + adapter)
        + kernel_seconds(
            padded,
            model,
            Kernels(layer_bytes=kernels.layer_bytes * _FORWARD_SHARE, head_bytes=0),
            device,
        )
    )

    num_parameters = model.num_parameters * passes
    trained = adapter / 2 if adapters else float(num_parameters)
    count = steps.micro_batches
    weight_bytes: float = num_parameters * (_READ_BYTES[precision] + again * 2) * count
    weight_bytes += trained * (
        _GRADIENT_BYTES[precision] * count + _ADDED_BYTES[precision] * (count - 1)
    )
    if recipe.use_dora:
        weight_bytes += 12 * model.n_embd**2 * model.n_layer * _DORA_BYTES * (1 + again) * count
    weights_seconds = weight_bytes / device.bytes_per_second

    layers = model.n_layer * passes
    host = device.host_seconds_per_layer * layers * (1 + again / 3) * (1.5 if adapters else 1.0)
    host *= _GROUPS_LAUNCHES if in_groups else 1.0
    busy = (
        blocks_seconds
        + head_seconds
        + attention_seconds
        + elementwise_seconds
        + again_seconds
        + weights_seconds
    )
    launch_seconds = max(0.0, host * count - busy)
    launch_seconds += _HOST_SECONDS_PER_STEP
    tensors = _TENSORS_PER_LAYER * layers
    launch_seconds += _HOST_SECONDS_PER_TENSOR[recipe.optimizer] * tensors

    update = _CLIP_BYTES[precision] + (
        _PURE_BF16_UPDATE_BYTES if precision == "pure_bf16" else _UPDATE_BYTES[recipe.optimizer]
    )
    share = 1 / world_size if strategy.shards_optimizer else 1.0
    optimizer_seconds = trained * share * update / device.bytes_per_second
    if strategy.offloads_optimizer:
        moved = (
            trained * share * 2 * (4 if precision == "no" else 2)
        )  # gradients there, weights back
        optimizer_seconds = (
            trained * update / _HOST_BYTES_PER_SECOND + moved / _HOST_LINK_BYTES_PER_SECOND
        )
    if OPTIMIZERS[recipe.optimizer].paged_tensor_elements and not adapters:
        # Where a page has no room it goes to the host and comes back: at worst all of them.
        moved = 2 * trained * OPTIMIZERS[recipe.optimizer].state_bytes_per_parameter
        optimizer_seconds += moved / _HOST_LINK_BYTES_PER_SECOND
    exchange_seconds = _exchange_seconds(
        strategy, profile.interconnect, num_parameters, trained, precision, count, world_size, busy
    )

    rate = f"{device.matmul_flops * device.at_width(model.n_embd) / 1e12:.3g} TFLOP/s"
    speed = f"{device.bytes_per_second / 1e9:.0f} GB/s"
    found = (
        (
            "matrix products",
            blocks_seconds,
            f"{times} x {forward.blocks / 1e6:.0f} MFLOP a token in the blocks, at {rate}.",
        ),
        ("head", head_seconds, f"{times} x {head / 1e6:.0f} MFLOP a token, at {rate}."),
        (
            "attention",
            attention_seconds,
            f"3 x {attention / 1e6:.1f} MFLOP a token: 2 L d T at sum L^2 / sum L = "
            f"{data.mean_context_tokens:.0f} tokens.",
        ),
        (
            "recomputation",
            again_seconds,
            "Gradient checkpointing computes each block's forward pass again.",
        ),
        (
            "elementwise",
            elementwise_seconds,
            f"{kernels.layer_bytes:.0f} bytes x L d and {kernels.head_bytes:.0f} x V a token, at "
            f"{speed}.",
        ),
        (
            "weights",
            weights_seconds,
            f"Weights are read and gradients written {count:.1f} times, once a micro batch, at "
            f"{speed}.",
        ),
        (
            "optimizer",
            optimizer_seconds,
            f"{update} bytes for each of {trained * share / 1e6:.0f}M trained weights.",
        ),
        (
            "exchange",
            exchange_seconds,
            f"{strategy.name} over {world_size} GPUs ({profile.interconnect}): what backward "
            "cannot hide.",
        ),
        (
            "launches",
            launch_seconds,
            "What the CPU that launches the kernels needs longer than the device, and its work "
            "between steps.",
        ),
    )
    return [TimeTerm(name=n, seconds=s, why=why) for n, s, why in found if s > 0]


def _kernels(recipe: TrainRecipe, *, head_share: float, in_groups: bool) -> Kernels:
    precision = recipe.mixed_precision
    plain = _KERNELS[precision]
    layer_bytes = plain.layer_bytes
    layer_bytes += _DROPOUT_BYTES[precision] if recipe.dropout else 0
    layer_bytes += 0 if recipe.fused_gelu else _PLAIN_GELU_BYTES[precision]
    layer_bytes += _GROUPS_BYTES[precision] if in_groups else 0
    return Kernels(layer_bytes=layer_bytes, head_bytes=plain.head_bytes * head_share)


def _exchange_seconds(
    strategy: ShardingStrategy,
    interconnect: str,
    num_parameters: float,
    trained: float,
    precision: str,
    micro_batches: float,
    world_size: int,
    busy_seconds: float,
) -> float:
    """Waiting for other GPUs: ring collectives move (n-1)/n of the bytes once for a gather or a
    reduce-scatter and twice for an all-reduce (Rajbhandari et al. 2020, section 7)."""
    fp32 = precision == "no"
    weight_bytes = num_parameters * (4 if fp32 else 2)
    gradient_bytes = trained * (4 if fp32 or strategy.backend in {"ddp", "fsdp2"} else 2)
    seconds = 0.0
    if strategy.offloads_parameters:  # for forward and backward, each GPU its own share
        moved = 2 * weight_bytes * micro_batches / world_size
        seconds += moved / _HOST_LINK_BYTES_PER_SECOND
    if world_size > 1:
        if strategy.shards_parameters:
            moved = (2 * weight_bytes + gradient_bytes) * micro_batches
        elif strategy.shards_gradients:
            moved = gradient_bytes * micro_batches + weight_bytes
        else:
            moved = 2 * gradient_bytes
        moved *= (world_size - 1) / world_size
        seconds += moved / _LINK_BYTES_PER_SECOND[interconnect]
    # Gathers hide behind the whole pass; gradients behind the last micro batch's backward.
    hiding = busy_seconds if strategy.shards_parameters else busy_seconds * 2 / 3 / micro_batches
    return seconds - min(hiding, seconds * _HIDDEN_SHARE)


def scoring_seconds_per_token(
    recipe: TrainRecipe, model: ModelSpec, device: Device, data: DataStatistics
) -> float:
    """Forward pass of one token, without a gradient; the head's product is as good as fp32 always,
    and where nothing is 16-bit all are, in TF32 none."""
    forward = forward_flops(
        n_layer=model.n_layer,
        n_embd=model.n_embd,
        vocab_size=model.vocab_size,
        context_tokens=data.mean_context_tokens,
    )
    at_width = device.at_width(model.n_embd)
    blocks = forward.blocks + forward.attention
    products = forward.head / (device.scoring_head_flops * at_width)
    if recipe.mixed_precision == "no":
        products += blocks / (device.fp32_matmul_flops * at_width)
    else:
        products += matmul_seconds(1, blocks, model.n_embd, device)
    kernels = _KERNELS[recipe.mixed_precision]
    moved = Kernels(layer_bytes=kernels.layer_bytes * _FORWARD_SHARE, head_bytes=12)
    host = device.host_seconds_per_layer / 3 * model.n_layer / recipe.micro_batch_tokens
    return max(host, products + kernel_seconds(1.0, model, moved, device))
