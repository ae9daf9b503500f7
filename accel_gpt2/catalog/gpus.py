"""GPUs that are known by name, with the figures that plans and MFU are computed from."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from accel_gpt2.units import MIB

# ECC and the driver keep a few per cent; the next size of the same card is 25% away or more.
_MEMORY_TOLERANCE = 0.1

# Compute capabilities of GPUs on which three fp16 products with fp32 sums are faster than one in
# fp32: V100, T4, A100, H100 and H200, B200, whose fp16 has about eight times the rate of fp32 or
# more. On the other rows it has four times at most.
FAST_HALVES = ((7, 0), (7, 5), (8, 0), (9, 0), (10, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One GPU as its vendor's sheet describes it.

    `match` is how drivers and torch spell the device's name, without a leading "NVIDIA".
    `memory_bytes` is what `nvidia-smi` shows as total. `peak_flops` are dense FLOP/s with fp32
    accumulation per dtype ("fp32" without tensor cores, "tf32", "fp16", "bf16"); a missing dtype is
    not supported by the tensor cores, or not known. None is unknown.

    `compute_capability` is CUDA's. `measured_matmul_flops` is the best that somebody saw torch's
    own 16-bit matrix product reach. `training_efficiency` is the part of the 16-bit peak that the
    matrix products of a training reach when they are wide; `efficiency_source` says where from.
    """

    name: str
    display_name: str
    match: tuple[str, ...]
    memory_bytes: int
    peak_flops: Mapping[str, float]
    bandwidth_bytes_per_second: float | None
    tdp_watts: int | None
    source: str
    compute_capability: tuple[int, int] = (0, 0)
    measured_matmul_flops: float | None = None
    training_efficiency: float = 0.5
    efficiency_source: str = "no training was published: half of the peak, as nearly all reach"

    @property
    def multiplies_by_halves(self) -> bool:
        """Whether a product as good as fp32 is made of fp16 ones (`train.loss`)."""
        return self.compute_capability in FAST_HALVES


# GeForce halves the tensor cores' rate when they accumulate in fp32, and that is the rate here.
_ADA = "NVIDIA Ada whitepaper (4090), by tensor cores and boost clock as llm.c's mfu.h does"

# What is left for matrix products of published trainings' time per token, when the bytes of their
# other kernels are taken away, as plan/step_time.py counts both; tests/plan/test_throughput.py has
# the published rates.
_BY_LLM_C_A100 = "llm.c's GPT-2 124M, 355M and 774M, llm-foundry's 350m and 1b on A100 80 GB"
_BY_LLM_C_H100 = "llm.c's GPT-2 124M and 1558M on H100 SXM"
_BY_LLM_C_4090 = "llm.c's GPT-2 124M on an RTX 4090"
# Measured matrix products: the tables of github.com/stas00/ml-engineering, lower end.

_ROWS = (
    GpuSpec(
        name="rtx4070ti",
        display_name="RTX 4070 Ti SUPER 16 GB",
        match=("GeForce RTX 4070 Ti SUPER",),
        memory_bytes=16376 * MIB,
        peak_flops={"fp32": 44.1e12, "tf32": 44.1e12, "fp16": 88.2e12, "bf16": 88.2e12},
        bandwidth_bytes_per_second=672e9,
        tdp_watts=285,
        source=_ADA,
        compute_capability=(8, 9),
        measured_matmul_flops=89e12,
        training_efficiency=0.65,
        efficiency_source=_BY_LLM_C_4090,
    ),
    GpuSpec(
        name="rtx4070ti-12gb",
        display_name="RTX 4070 Ti 12 GB",
        match=("GeForce RTX 4070 Ti",),
        memory_bytes=12282 * MIB,
        peak_flops={"fp32": 40.1e12, "tf32": 40.1e12, "fp16": 80.2e12, "bf16": 80.2e12},
        bandwidth_bytes_per_second=504e9,
        tdp_watts=285,
        source=_ADA,
        compute_capability=(8, 9),
        training_efficiency=0.65,
        efficiency_source=_BY_LLM_C_4090,
    ),
    GpuSpec(
        name="rtx4090",
        display_name="RTX 4090 24 GB",
        match=("GeForce RTX 4090",),
        memory_bytes=24564 * MIB,
        peak_flops={"fp32": 82.6e12, "tf32": 82.6e12, "fp16": 165.2e12, "bf16": 165.2e12},
        bandwidth_bytes_per_second=1008e9,
        tdp_watts=450,
        source="NVIDIA Ada whitepaper, appendix A",
        compute_capability=(8, 9),
        measured_matmul_flops=159e12,
        training_efficiency=0.65,
        efficiency_source=_BY_LLM_C_4090,
    ),
    GpuSpec(
        name="rtx3090",
        display_name="RTX 3090 24 GB",
        match=("GeForce RTX 3090",),
        memory_bytes=24576 * MIB,
        peak_flops={"fp32": 35.6e12, "tf32": 35.6e12, "fp16": 71.2e12, "bf16": 71.2e12},
        bandwidth_bytes_per_second=936e9,
        tdp_watts=350,
        source="NVIDIA GA102 whitepaper, appendix A",
        compute_capability=(8, 6),
        measured_matmul_flops=75e12,
        training_efficiency=0.65,
        efficiency_source="as the RTX 4090, whose matrix products reach as much of the peak",
    ),
    GpuSpec(
        name="a100-40",
        display_name="A100 SXM 40 GB",
        match=("A100-SXM4-40GB",),
        memory_bytes=40960 * MIB,
        peak_flops={"fp32": 19.5e12, "tf32": 156e12, "fp16": 312e12, "bf16": 312e12},
        bandwidth_bytes_per_second=1555e9,
        tdp_watts=400,
        source="NVIDIA A100 datasheet",
        compute_capability=(8, 0),
        measured_matmul_flops=234e12,
        training_efficiency=0.7,
        efficiency_source=_BY_LLM_C_A100,
    ),
    GpuSpec(
        name="a100-40-pcie",
        display_name="A100 PCIe 40 GB",
        match=("A100-PCIE-40GB",),
        memory_bytes=40960 * MIB,
        peak_flops={"fp32": 19.5e12, "tf32": 156e12, "fp16": 312e12, "bf16": 312e12},
        bandwidth_bytes_per_second=1555e9,
        tdp_watts=250,
        source="NVIDIA A100 datasheet",
        compute_capability=(8, 0),
        measured_matmul_flops=234e12,
        training_efficiency=0.7,
        efficiency_source=_BY_LLM_C_A100,
    ),
    GpuSpec(
        name="a100-80",
        display_name="A100 SXM 80 GB",
        match=("A100-SXM4-80GB", "A100-SXM-80GB"),
        memory_bytes=81920 * MIB,
        peak_flops={"fp32": 19.5e12, "tf32": 156e12, "fp16": 312e12, "bf16": 312e12},
        bandwidth_bytes_per_second=2039e9,
        tdp_watts=400,
        source="NVIDIA A100 datasheet",
        compute_capability=(8, 0),
        measured_matmul_flops=234e12,
        training_efficiency=0.7,
        efficiency_source=_BY_LLM_C_A100,
    ),
    GpuSpec(
        name="a100-80-pcie",
        display_name="A100 PCIe 80 GB",
        match=("A100 80GB PCIe", "A100-PCIE-80GB"),
        memory_bytes=81920 * MIB,
        peak_flops={"fp32": 19.5e12, "tf32": 156e12, "fp16": 312e12, "bf16": 312e12},
        bandwidth_bytes_per_second=1935e9,
        tdp_watts=300,
        source="NVIDIA A100 datasheet",
        compute_capability=(8, 0),
        measured_matmul_flops=234e12,
        training_efficiency=0.7,
        efficiency_source=_BY_LLM_C_A100,
    ),
    GpuSpec(
        name="h100-80",
        display_name="H100 SXM 80 GB",
        match=("H100 80GB HBM3",),
        memory_bytes=81559 * MIB,
        peak_flops={"fp32": 67e12, "tf32": 494.5e12, "fp16": 989e12, "bf16": 989e12},
        bandwidth_bytes_per_second=3350e9,
        tdp_watts=700,
        source="NVIDIA H100 datasheet, halved where it counts sparsity",
        compute_capability=(9, 0),
        measured_matmul_flops=784e12,
        training_efficiency=0.6,
        efficiency_source=_BY_LLM_C_H100,
    ),
    GpuSpec(
        name="h100-80-pcie",
        display_name="H100 PCIe 80 GB",
        match=("H100 PCIe",),
        memory_bytes=81559 * MIB,
        peak_flops={"fp32": 51e12, "tf32": 378e12, "fp16": 756e12, "bf16": 756e12},
        bandwidth_bytes_per_second=2000e9,
        tdp_watts=350,
        source="NVIDIA H100 datasheet, halved where it counts sparsity",
        compute_capability=(9, 0),
        measured_matmul_flops=458e12,
        training_efficiency=0.46,
        efficiency_source=f"{_BY_LLM_C_H100}, less as its measured matrix product is",
    ),
    GpuSpec(
        name="h200",
        display_name="H200 SXM 141 GB",
        match=("H200",),
        memory_bytes=143771 * MIB,
        peak_flops={"fp32": 67e12, "tf32": 494.5e12, "fp16": 989e12, "bf16": 989e12},
        bandwidth_bytes_per_second=4800e9,
        tdp_watts=700,
        source="NVIDIA H200 datasheet, halved where it counts sparsity",
        compute_capability=(9, 0),
        measured_matmul_flops=790e12,
        training_efficiency=0.6,
        efficiency_source=_BY_LLM_C_H100,
    ),
    GpuSpec(
        name="l4",
        display_name="L4 24 GB",
        match=("L4",),
        memory_bytes=23034 * MIB,
        peak_flops={"fp32": 30.3e12, "tf32": 60e12, "fp16": 121e12, "bf16": 121e12},
        bandwidth_bytes_per_second=300e9,
        tdp_watts=72,
        source="NVIDIA L4 datasheet, halved where it counts sparsity",
        compute_capability=(8, 9),
        measured_matmul_flops=70e12,
        training_efficiency=0.38,
        efficiency_source=f"{_BY_LLM_C_4090}, less as its measured matrix product is",
    ),
    GpuSpec(
        name="t4",
        display_name="T4 16 GB",
        match=("Tesla T4", "T4"),
        memory_bytes=15360 * MIB,
        peak_flops={"fp32": 8.1e12, "fp16": 65e12},  # bf16 is emulated, at 2 TFLOP/s
        bandwidth_bytes_per_second=320e9,
        tdp_watts=70,
        source="NVIDIA T4 datasheet",
        compute_capability=(7, 5),
    ),
    GpuSpec(
        name="v100",
        display_name="V100 SXM 16 GB",
        match=("Tesla V100-SXM2-16GB",),
        memory_bytes=16384 * MIB,
        peak_flops={"fp32": 15.7e12, "fp16": 125e12},  # bf16 is emulated, at 10 TFLOP/s
        bandwidth_bytes_per_second=900e9,
        tdp_watts=300,
        source="NVIDIA V100 datasheet",
        compute_capability=(7, 0),
    ),
    GpuSpec(
        name="v100-32",
        display_name="V100 SXM 32 GB",
        match=("Tesla V100-SXM2-32GB",),
        memory_bytes=32768 * MIB,
        peak_flops={"fp32": 15.7e12, "fp16": 125e12},
        bandwidth_bytes_per_second=900e9,
        tdp_watts=300,
        source="NVIDIA V100 datasheet",
        compute_capability=(7, 0),
    ),
    GpuSpec(
        name="a10g",
        display_name="A10G 24 GB",
        match=("A10G",),
        memory_bytes=23028 * MIB,
        peak_flops={"fp16": 70e12, "bf16": 70e12},
        bandwidth_bytes_per_second=600e9,
        tdp_watts=300,
        source="NVIDIA A10G sheet of AWS G5; the fp32 rates are not stated there",
        compute_capability=(8, 6),
    ),
)

GPUS: Mapping[str, GpuSpec] = MappingProxyType({row.name: row for row in _ROWS})


def find_gpu(device_name: str, memory_bytes: int) -> GpuSpec | None:
    """The row of a device, by its whole name and by its memory; None when there is none.

    A laptop card, a MIG slice or a new model is unknown, and not taken for its nearest relative.

    >>> find_gpu("NVIDIA GeForce RTX 4070 Ti SUPER", 16376 * MIB).name
    'rtx4070ti'
    >>> find_gpu("NVIDIA GeForce RTX 4090 Laptop GPU", 16376 * MIB) is None
    True
    """
    spelled = _plain(device_name)
    for row in GPUS.values():
        same_name = spelled in {_plain(name) for name in row.match}
        if same_name and abs(memory_bytes / row.memory_bytes - 1) <= _MEMORY_TOLERANCE:
            return row
    return None


def _plain(device_name: str) -> str:
    return re.sub(r"^nvidia\s+", "", " ".join(device_name.split()).casefold())
