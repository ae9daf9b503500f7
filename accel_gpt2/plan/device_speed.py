"""What one device does in a second: matrix products, bytes, launches."""

from dataclasses import dataclass

from accel_gpt2.catalog.gpus import GpuSpec
from accel_gpt2.plan.flops import peak_flops_per_second

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What one device does in a second.

    `matmul_flops`, `fp32_matmul_flops` and `scoring_head_flops` (of a score's head, in fp32 or as
    good: train/loss.py) are of matrix products of unlimited width; at a width of `half_width` they
    reach half of it. `host_seconds_per_layer` is what the CPU needs to launch the forward and
    backward pass of one block, 0 where it computes itself.
    """

    matmul_flops: float
    fp32_matmul_flops: float
    scoring_head_flops: float
    half_width: float
    bytes_per_second: float
    host_seconds_per_layer: float
    source: str

    def at_width(self, n_embd: int) -> float:
        """The part of `matmul_flops` that a model of this width reaches."""
        return n_embd / (n_embd + self.half_width)


# One core of a server, between two that were measured, one of them 1.4 times as fast as the other
# (docs/benchmarks, throughput-model). A busy machine is slower, so the range around a plan for a
# CPU is wide until it was measured.
_CPU_MATMUL_FLOPS = 92e9
_CPU_BYTES_PER_SECOND = 12.5e9
_CPU_HALF_WIDTH = 64.0
_CPU_HOST_SECONDS_PER_LAYER = 1e-3
_CPU_BF16_SHARE = 0.01  # torch has fast bf16 products on few CPUs; elsewhere 1/100 was measured
# How much n cores are faster than one: n to this power, measured with two.
_CORES_MATMUL_POWER = 0.8
_CORES_BYTES_POWER = 0.5

# A GPU without a row stands in for one only where it was measured: the ratio takes this away again.
UNKNOWN_GPU = Device(
    matmul_flops=50e12,
    fp32_matmul_flops=20e12,
    scoring_head_flops=20e12,
    half_width=20.0,
    bytes_per_second=500e9,
    host_seconds_per_layer=_HOST_SECONDS_PER_LAYER,
    source="a GPU without a catalog row",
)


def device_of(
    gpu: GpuSpec | None, mixed_precision: str, *, tf32: bool = False, num_threads: int = 1
) -> Device | None:
    """The rates of a GPU in a precision, or of a CPU; None where the catalog does not know them.

    Args:
        num_threads: of a CPU that does the work itself, one for each core.
        tf32: whether a training's fp32 products are made in TF32, where the GPU has that.
    """
    if gpu is None:
        return _cpu(mixed_precision, num_threads)
    peak = peak_flops_per_second(gpu, mixed_precision, tf32=tf32)
    if peak is None or gpu.bandwidth_bytes_per_second is None:
        return None
    share, how = gpu.training_efficiency, gpu.efficiency_source
    if mixed_precision == "no":
        # TF32 has the peak of fp32 on GeForce cards, and then makes nothing slower.
        in_tf32 = share * peak if tf32 and "tf32" in gpu.peak_flops else 0.0
        if in_tf32 > _FP32_SHARE * gpu.peak_flops.get("fp32", 0.0):
            how = f"in TF32; {how}"
        else:
            peak, share, how = gpu.peak_flops["fp32"], _FP32_SHARE, "cuBLAS in fp32"
    # Where fp32 has no rate of its own on the sheet, tensor cores have about eight times it.
    in_fp32 = _FP32_SHARE * gpu.peak_flops.get("fp32", max(gpu.peak_flops.values()) / 8)
    by_halves = in_fp32
    if gpu.multiplies_by_halves:
        by_halves = gpu.training_efficiency * gpu.peak_flops["fp16"] / 3
    return Device(
        matmul_flops=peak * share,
        fp32_matmul_flops=in_fp32,
        scoring_head_flops=by_halves,
        half_width=peak * _HALF_WIDTH_SECONDS,
        bytes_per_second=gpu.bandwidth_bytes_per_second * _BANDWIDTH_SHARE,
        host_seconds_per_layer=_HOST_SECONDS_PER_LAYER,
        source=f"{gpu.display_name}: {share:.0%} of {peak / 1e12:.0f} TFLOP/s ({how})",
    )


def _cpu(mixed_precision: str, num_threads: int) -> Device:
    products = _CPU_MATMUL_FLOPS * num_threads**_CORES_MATMUL_POWER
    cores = "one core" if num_threads == 1 else f"{num_threads} cores"
    source = f"{cores} of a server's CPU"
    share = 1.0
    if mixed_precision != "no":
        share = _CPU_BF16_SHARE
        source += ", bf16 without units for it"
    return Device(
        matmul_flops=products * share,
        fp32_matmul_flops=products,
        scoring_head_flops=products,
        half_width=_CPU_HALF_WIDTH,
        bytes_per_second=_CPU_BYTES_PER_SECOND * num_threads**_CORES_BYTES_POWER,
        host_seconds_per_layer=_CPU_HOST_SECONDS_PER_LAYER,
        source=source,
    )


def matmul_seconds(tokens: float, flops_per_token: float, n_embd: int, device: Device) -> float:
    """Time of 16-bit (or of all fp32) matrix products of a width."""
    return tokens * flops_per_token / (device.matmul_flops * device.at_width(n_embd))
