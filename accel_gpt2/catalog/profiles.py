"""Machines that are known by name: the person's own cards and the ones that are often rented.

`--profile auto` is no row: it is detection.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from accel_gpt2.catalog.gpus import GPUS, GpuSpec
from accel_gpt2.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """A machine: `num_gpus` cards of one kind, or none (`gpu` is None) and the CPU does the work.

    `host_memory_bytes` is what the plan may count on, `num_threads` what computes where there is
    no GPU. `recipe_defaults` are recipe values that the
    machine decides; the global batch is never among them, so that every machine trains the same
    model.
    """

    name: str
    gpu: GpuSpec | None
    num_gpus: int
    interconnect: str  # between the GPUs: "none", "pcie", "nvlink"
    host_memory_bytes: int
    num_threads: int = 1
    recipe_defaults: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


_BF16 = MappingProxyType({"mixed_precision": "bf16"})
_FP16 = MappingProxyType({"mixed_precision": "fp16"})
_FP32 = MappingProxyType({"mixed_precision": "no"})


def _row(
    name: str,
    gpu: str,
    *,
    num_gpus: int = 1,
    interconnect: str = "none",
    host_gib: int,
    recipe_defaults: Mapping[str, object] = _BF16,
) -> HardwareProfile:
    return HardwareProfile(
        name=name,
        gpu=GPUS[gpu],
        num_gpus=num_gpus,
        interconnect=interconnect,
        host_memory_bytes=host_gib * GIB,
        recipe_defaults=recipe_defaults,
    )


# Host memory: what such a desktop usually has, or the smallest one-GPU offer among Lambda (A100,
# H100, H200), GCP g2 (L4) and AWS g4dn (T4). GeForce 40 has no NVLink.
_ROWS = (
    _row("rtx4070ti", "rtx4070ti", host_gib=32),
    _row("rtx4070ti-12gb", "rtx4070ti-12gb", host_gib=32),
    _row("2x-rtx4070ti", "rtx4070ti", num_gpus=2, interconnect="pcie", host_gib=64),
    _row("rtx3090", "rtx3090", host_gib=32),
    _row("rtx4090", "rtx4090", host_gib=32),
    _row("4x-rtx3090", "rtx3090", num_gpus=4, interconnect="pcie", host_gib=128),
    _row("4x-rtx4090", "rtx4090", num_gpus=4, interconnect="pcie", host_gib=128),
    _row("a100-40", "a100-40", host_gib=80),
    _row("a100-80", "a100-80", host_gib=100),
    _row("h100-80", "h100-80", host_gib=100),
    _row("h200", "h200", host_gib=100),
    _row("l4", "l4", host_gib=16),
    _row("t4", "t4", host_gib=12, recipe_defaults=_FP16),
    HardwareProfile(
        name="cpu",
        gpu=None,
        num_gpus=0,
        interconnect="none",
        host_memory_bytes=4 * GIB,
        recipe_defaults=_FP32,
    ),
)

PROFILES: Mapping[str, HardwareProfile] = MappingProxyType({row.name: row for row in _ROWS})
