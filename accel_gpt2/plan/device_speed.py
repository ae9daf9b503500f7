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
UNKNOWN_GPU = Device(
    matmul_flops=50e12,
    fp32_matmul_flops=20e12,
    half_width=20.0,
    bytes_per_second=500e9,
    host_seconds_per_layer=_HOST_SECONDS_PER_LAYER,
    source="a GPU without a catalog row",
)


def device_of(gpu: GpuSpec | None, mixed_precision: str, *, tf32: bool = False) -> Device | None:
    """The rates of a GPU in a precision, or of a CPU; None where the catalog does not know them.

    Args:
        tf32: whether a training's fp32 products are made in TF32, where the GPU has that.
    """
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
    peak = peak_flops_per_second(gpu, mixed_precision, tf32=tf32)
    if peak is None or gpu.bandwidth_bytes_per_second is None:
        return None
    share, how = gpu.training_efficiency, gpu.efficiency_source
    if mixed_precision == "no":
        # TF32 has the peak of fp32 on GeForce cards, and then makes nothing slower.
        in_tf32 = share * peak if tf32 and "tf32" in gpu.peak_flops else 0.0
        in_fp32 = _FP32_SHARE * gpu.peak_flops.get("fp32", 0.0)
        if in_tf32 > in_fp32:
            how = f"in TF32; {how}"
        else:
            peak, share, how = gpu.peak_flops["fp32"], _FP32_SHARE, "cuBLAS in fp32"
    # Where fp32 has no rate of its own on the sheet, tensor cores have about eight times it.
    fp32_peak = gpu.peak_flops.get("fp32", max(gpu.peak_flops.values()) / 8)
    return Device(
        matmul_flops=peak * share,
        fp32_matmul_flops=fp32_peak * _FP32_SHARE,
        half_width=peak * _HALF_WIDTH_SECONDS,
        bytes_per_second=gpu.bandwidth_bytes_per_second * _BANDWIDTH_SHARE,
        host_seconds_per_layer=_HOST_SECONDS_PER_LAYER,
        source=f"{gpu.display_name}: {share:.0%} of {peak / 1e12:.0f} TFLOP/s ({how})",
    )


def matmul_seconds(tokens: float, flops_per_token: float, n_embd: int, device: Device) -> float:
    """Time of 16-bit (or of all fp32) matrix products of a width."""
    return tokens * flops_per_token / (device.matmul_flops * device.at_width(n_embd))
