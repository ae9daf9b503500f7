"""How long a training takes: seconds from operations, bytes and launches, as a range.

A step's matrix products run at a part of the device's peak that published trainings show
(`catalog.gpus`); its other kernels move bytes at the memory's bandwidth; the CPU that launches all
of them may be slower than the GPU; and several GPUs wait for each other's gradients. What was
measured on the machine itself (`plan.calibration`) corrects the sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from accel_gpt2.catalog.gpus import GpuSpec
from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.catalog.optimizers import OPTIMIZERS
from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.plan.calibration import Calibration, Residual
from accel_gpt2.plan.data import DataStatistics
from accel_gpt2.plan.flops import forward_flops, peak_flops_per_second, train_flops_per_token
from accel_gpt2.plan.steps import (
    StepPlan,
    num_evaluations,
    num_saves,
    plan_steps,
)
from accel_gpt2.recipe import TrainRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondsRange:
    """A duration as well as it is known."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeTerm:
    """One part of a duration; `why` is one sentence with its formula and the source."""

    name: str
    seconds: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePlan:
    """The time of a whole run, all classes one after another, and of one optimizer step.

    `tokens_per_second` and `mfu` (None where the peak is unknown) are of training steps alone, over
    all processes; tokens are predicted tokens, padding not counted. `num_steps` and `train_tokens`
    are of all classes and epochs. `source` says what the numbers rest on.
    """

    total: SecondsRange
    terms: tuple[TimeTerm, ...]
    step_seconds: SecondsRange
    step_terms: tuple[TimeTerm, ...]
    tokens_per_second: float
    mfu: float | None
    num_steps: int
    train_tokens: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What one device does in a second.

    `matmul_flops` and `fp32_matmul_flops` are of matrix products of unlimited width; at a width
    of `half_width` they reach half of it. `host_seconds_per_layer` is what the CPU needs to launch
    the forward and backward pass of one block, 0 where it computes itself.
    """

    matmul_flops: float
    fp32_matmul_flops: float
    half_width: float
    bytes_per_second: float
    host_seconds_per_layer: float
    source: str

    def at_width(self, n_embd: int) -> float:
        """The part of `matmul_flops` that a model of this width reaches."""
        return n_embd / (n_embd + self.half_width)


# Of the sheet's bandwidth, what streaming kernels reach: 0.85 to 0.92 in STREAM-like tests.
_BANDWIDTH_SHARE = 0.85
# fp32 products without tensor cores are simpler to keep busy: cuBLAS reaches 80 to 95%.
_FP32_SHARE = 0.8
# Narrow products keep a fast GPU less busy: fitted, with `training_efficiency`, to llm.c's 124M and
# 1558M on H100 and to its 124M, 355M and 774M on A100, as 223 and 70 wide.
_HALF_WIDTH_SECONDS = 2.25e-13
# Python, autograd and launches of transformers' GPT-2 on a server CPU: 13 ms for 12 blocks, 56 ms
# for 48, forward and backward.
_HOST_SECONDS_PER_LAYER = 1.1e-3
# Accelerate's overhead (0.55 ms), clipping, the optimizer's launches, one wait for the device.
_HOST_SECONDS_PER_STEP = 2e-3
# bitsandbytes launches a kernel per tensor, torch's Adafactor some fifteen.
_HOST_SECONDS_PER_TENSOR = {
    "adamw": 0.0, "adamw_8bit": 5e-5, "adamw_paged": 5e-5, "adamw_8bit_paged": 5e-5,
    "adafactor": 2e-4,
}  # fmt: skip
_TENSORS_PER_LAYER = 12

# Fitted to gpt2-tiny and gpt2-mini on one core of a server (docs/benchmarks,
# 2026-11-23-throughput-model.md). More cores are faster and a busy machine is slower, so the range
# around a plan for a CPU is wide until it was measured.
CPU = Device(
    matmul_flops=100e9,
    fp32_matmul_flops=100e9,
    half_width=128.0,
    bytes_per_second=5e9,
    host_seconds_per_layer=1e-3,
    source="one core of a server's CPU",
)
_CPU_BF16_SHARE = 0.01  # torch has fast bf16 products on few CPUs; elsewhere 1/100 was measured

# A GPU without a row stands in for one only where it was measured: the ratio takes this away again.
_UNKNOWN_GPU = Device(
    matmul_flops=50e12,
    fp32_matmul_flops=20e12,
    half_width=20.0,
    bytes_per_second=500e9,
    host_seconds_per_layer=_HOST_SECONDS_PER_LAYER,
    source="a GPU without a catalog row",
)


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

# Around the steps.
_START_SECONDS = 25.0  # processes, torch and transformers imported, a CUDA context: 15 to 40
_MODEL_SECONDS = 3.0  # built, moved, its first step slower
_TOKENIZED_PER_SECOND = 0.34e6  # tokens, one core, once for each data set and vocabulary
_DISK_BYTES_PER_SECOND = 0.4e9  # hashed, written and flushed: a SATA SSD; NVMe is three times it

# How far the truth may lie: published trainings are within 35% of the formula (the test holds it),
# nothing was published of GPT-2 in shards or offloaded, and CPUs differ by a factor.
_COLD_SPREAD = 1.35
_UNPUBLISHED_SPREAD = 2.0
_CPU_SPREAD = 3.0


def plan_time(
    recipe: TrainRecipe,
    model: ModelSpec,
    profile: HardwareProfile,
    strategy: ShardingStrategy,
    data: DataStatistics,
    *,
    calibration: Calibration | None = None,
) -> TimePlan | None:
    """The time of a run; None on a GPU that has no catalog row and was never measured."""
    gpu = profile.gpu
    residual = None
    if calibration is not None:
        residual = calibration.residual(
            "tokens_per_second", gpu=gpu, strategy=strategy.name, recipe=recipe, model=model
        )
    device = device_of(gpu, recipe.mixed_precision)
    if device is None:
        if residual is None:
            return None
        device = _UNKNOWN_GPU
    slower, low, high, source = _correction(device, gpu, strategy, residual)

    world_size = 1 if strategy.backend == "none" else max(1, profile.num_gpus)
    steps = plan_steps(recipe, data, world_size)
    step_terms = tuple(
        TimeTerm(name=term.name, seconds=term.seconds * slower, why=term.why)
        for term in _step_terms(
            recipe, model, device, strategy, profile.interconnect, data, steps, world_size
        )
    )
    step_seconds = sum(term.seconds for term in step_terms)
    terms = _run_terms(recipe, model, device, data, steps, step_seconds, slower, world_size)
    total = sum(term.seconds for term in terms)
    num_steps = steps.num_models * steps.num_steps
    tokens_per_second = steps.tokens / step_seconds
    peak = peak_flops_per_second(gpu, recipe.mixed_precision)
    flops = train_flops_per_token(
        n_layer=model.n_layer,
        n_embd=model.n_embd,
        vocab_size=model.vocab_size,
        context_tokens=data.mean_context_tokens,
        frozen_base=recipe.finetuning != "full",
    )
    return TimePlan(
        total=SecondsRange(low=total * low, expected=total, high=total * high),
        terms=terms,
        step_seconds=SecondsRange(
            low=step_seconds * low, expected=step_seconds, high=step_seconds * high
        ),
        step_terms=step_terms,
        tokens_per_second=tokens_per_second,
        mfu=None if peak is None else tokens_per_second * flops / (peak * world_size),
        num_steps=num_steps,
        train_tokens=round(num_steps * steps.tokens),
        source=f"{source}; lengths: {data.source}",
    )


def cold_tokens_per_second(
    recipe: TrainRecipe,
    model: ModelSpec,
    profile: HardwareProfile,
    strategy: ShardingStrategy,
    data: DataStatistics,
) -> float:
    """What the formula alone says, which is what measurements are compared with."""
    device = device_of(profile.gpu, recipe.mixed_precision) or _UNKNOWN_GPU
    world_size = 1 if strategy.backend == "none" else max(1, profile.num_gpus)
    steps = plan_steps(recipe, data, world_size)
    terms = _step_terms(
        recipe, model, device, strategy, profile.interconnect, data, steps, world_size
    )
    return steps.tokens / sum(term.seconds for term in terms)


def device_of(gpu: GpuSpec | None, mixed_precision: str) -> Device | None:
    """The rates of a GPU in a precision, or of a CPU; None where the catalog does not know them."""
    if gpu is None:
        if mixed_precision == "no":
            return CPU
        return Device(
            matmul_flops=CPU.matmul_flops * _CPU_BF16_SHARE,
            fp32_matmul_flops=CPU.fp32_matmul_flops,
            half_width=CPU.half_width,
            bytes_per_second=CPU.bytes_per_second,
            host_seconds_per_layer=CPU.host_seconds_per_layer,
            source=f"{CPU.source}, bf16 without units for it",
        )
    peak = peak_flops_per_second(gpu, mixed_precision)
    if peak is None or gpu.bandwidth_bytes_per_second is None:
        return None
    in_fp32 = mixed_precision == "no"
    share = _FP32_SHARE if in_fp32 else gpu.training_efficiency
    # Where fp32 has no rate of its own on the sheet, tensor cores have about eight times it.
    fp32_peak = gpu.peak_flops.get("fp32", max(gpu.peak_flops.values()) / 8)
    return Device(
        matmul_flops=peak * share,
        fp32_matmul_flops=fp32_peak * _FP32_SHARE,
        half_width=peak * _HALF_WIDTH_SECONDS,
        bytes_per_second=gpu.bandwidth_bytes_per_second * _BANDWIDTH_SHARE,
        host_seconds_per_layer=_HOST_SECONDS_PER_LAYER,
        source=(
            f"{gpu.display_name}: {share:.0%} of {peak / 1e12:.0f} TFLOP/s "
            f"({'cuBLAS in fp32' if in_fp32 else gpu.efficiency_source})"
        ),
    )


def _correction(
    device: Device, gpu: GpuSpec | None, strategy: ShardingStrategy, residual: Residual | None
) -> tuple[float, float, float, str]:
    """What seconds are multiplied by, the range around the result, and what that rests on."""
    if residual is not None:
        return (
            1 / residual.ratio,
            residual.ratio / residual.high,
            residual.ratio / residual.low,
            f"{device.source}, times {1 / residual.ratio:.2f} {residual.source}",
        )
    spread = _COLD_SPREAD if strategy.backend in {"none", "ddp"} else _UNPUBLISHED_SPREAD
    if gpu is None:
        spread = _CPU_SPREAD
    return 1.0, 1 / spread, spread, f"{device.source}, never measured here"


def matmul_seconds(tokens: float, flops_per_token: float, n_embd: int, device: Device) -> float:
    """Time of 16-bit (or of all fp32) matrix products of a width."""
    return tokens * flops_per_token / (device.matmul_flops * device.at_width(n_embd))


def kernel_seconds(tokens: float, model: ModelSpec, kernels: Kernels, device: Device) -> float:
    """Time of all other kernels: their bytes over the bandwidth."""
    per_token = (
        kernels.layer_bytes * model.n_layer * model.n_embd + kernels.head_bytes * model.vocab_size
    )
    return tokens * per_token / device.bytes_per_second


def _step_terms(
    recipe: TrainRecipe,
    model: ModelSpec,
    device: Device,
    strategy: ShardingStrategy,
    interconnect: str,
    data: DataStatistics,
    steps: StepPlan,
    world_size: int,
) -> Sequence[TimeTerm]:
    """One optimizer step on one of `world_size` equal devices, by what it waits for."""
    precision = recipe.mixed_precision
    adapters = recipe.finetuning != "full"
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
    kernels = _kernels(recipe, head_share=head / forward.head)
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
        strategy, interconnect, num_parameters, trained, precision, count, world_size, busy
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
            f"{strategy.name} over {world_size} GPUs ({interconnect}): what backward cannot hide.",
        ),
        (
            "launches",
            launch_seconds,
            "What the CPU that launches the kernels needs longer than the device, and its work "
            "between steps.",
        ),
    )
    return [TimeTerm(name=n, seconds=s, why=why) for n, s, why in found if s > 0]


def _kernels(recipe: TrainRecipe, *, head_share: float) -> Kernels:
    precision = recipe.mixed_precision
    plain = _KERNELS[precision]
    layer_bytes = plain.layer_bytes
    layer_bytes += _DROPOUT_BYTES[precision] if recipe.dropout else 0
    layer_bytes += 0 if recipe.fused_gelu else _PLAIN_GELU_BYTES[precision]
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


def _run_terms(
    recipe: TrainRecipe,
    model: ModelSpec,
    device: Device,
    data: DataStatistics,
    steps: StepPlan,
    step_seconds: float,
    slower: float,
    world_size: int,
) -> tuple[TimeTerm, ...]:
    models, mean = steps.num_models, data.mean_tokens
    evaluations = num_evaluations(recipe, steps)
    scored = data.num_validation_documents * mean
    scoring_seconds = slower / world_size * _scoring_seconds(recipe, model, device, data)
    tests = 0 if recipe.objective == "unconditional" else data.num_test_documents
    saves = num_saves(recipe, steps.num_steps, steps.steps_per_epoch)
    state = 4 + OPTIMIZERS[recipe.optimizer].state_bytes_per_parameter
    trained = model.num_parameters
    if recipe.finetuning != "full":
        trained = 16 * recipe.lora_rank * model.n_embd * model.n_layer
    written = trained * (state * saves + 4)
    tokens = (data.num_train_documents + data.num_validation_documents + tests) * mean
    found = (
        (
            "training",
            models * steps.num_steps * step_seconds,
            f"{models} x {steps.num_steps:,} steps of {steps.tokens:,.0f} tokens.",
        ),
        (
            "validation",
            models * evaluations * scored * scoring_seconds,
            f"{models} x {evaluations} times {data.num_validation_documents:,} documents of all "
            "classes, forward only, logits in fp32.",
        ),
        (
            "checkpoints",
            models * written / _DISK_BYTES_PER_SECOND,
            f"{models} x {saves} of {trained * state / 1e9:.2f} GB and a model each, at "
            f"{_DISK_BYTES_PER_SECOND / 1e9:.1f} GB/s.",
        ),
        (
            "start",
            _START_SECONDS + models * _MODEL_SECONDS + tokens / _TOKENIZED_PER_SECOND,
            f"Libraries, {models} model(s) built, and {tokens / 1e6:.1f}M tokens made at "
            f"{_TOKENIZED_PER_SECOND / 1e6:.2f}M a second, the first time.",
        ),
        (
            "test scoring",
            models * tests * mean * scoring_seconds,
            f"{tests:,} test documents under {models} model(s): `accel-gpt2 evaluate`.",
        ),
    )
    return tuple(TimeTerm(name=n, seconds=s, why=why) for n, s, why in found if s > 0)


def _scoring_seconds(
    recipe: TrainRecipe, model: ModelSpec, device: Device, data: DataStatistics
) -> float:
    """Forward pass of one token, without a gradient; the head's product is fp32 always."""
    forward = forward_flops(
        n_layer=model.n_layer,
        n_embd=model.n_embd,
        vocab_size=model.vocab_size,
        context_tokens=data.mean_context_tokens,
    )
    blocks = matmul_seconds(1, forward.blocks + forward.attention, model.n_embd, device)
    head = forward.head / (device.fp32_matmul_flops * device.at_width(model.n_embd))
    kernels = _KERNELS[recipe.mixed_precision]
    moved = Kernels(layer_bytes=kernels.layer_bytes * _FORWARD_SHARE, head_bytes=12)
    host = device.host_seconds_per_layer / 3 * model.n_layer / recipe.micro_batch_tokens
    return max(host, blocks + head + kernel_seconds(1.0, model, moved, device))
