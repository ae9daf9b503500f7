"""GPU rows: found by the names that drivers give, never guessed."""

import pytest

from accel_gpt2.catalog.gpus import GPUS, find_gpu
from accel_gpt2.units import GIB, MIB

# What torch.cuda.get_device_name and total_memory say on real machines.
SEEN_ON_REAL_MACHINES = [
    ("NVIDIA GeForce RTX 4070 Ti SUPER", 16376 * MIB, "rtx4070ti"),
    ("NVIDIA GeForce RTX 4070 Ti", 12282 * MIB, "rtx4070ti-12gb"),
    ("NVIDIA GeForce RTX 3090", 24_154_996_736, "rtx3090"),
    ("GeForce RTX 3090", 24268 * MIB, "rtx3090"),
    ("NVIDIA GeForce RTX 4090", 24564 * MIB, "rtx4090"),
    ("NVIDIA A100-SXM4-40GB", 42_298_834_944, "a100-40"),
    ("NVIDIA A100-PCIE-40GB", 40536 * MIB, "a100-40-pcie"),
    ("NVIDIA A100-SXM4-80GB", 81920 * MIB, "a100-80"),
    ("NVIDIA A100 80GB PCIe", 81920 * MIB, "a100-80-pcie"),
    ("NVIDIA H100 80GB HBM3", 81559 * MIB, "h100-80"),
    ("NVIDIA H100 PCIe", 81559 * MIB, "h100-80-pcie"),
    ("NVIDIA H200", 143771 * MIB, "h200"),
    ("NVIDIA L4", 22_478_000_128, "l4"),
    ("Tesla T4", 15_835_660_288, "t4"),
    ("Tesla V100-SXM2-16GB", 16160 * MIB, "v100"),
    ("Tesla V100-SXM2-32GB", 32510 * MIB, "v100-32"),
    ("NVIDIA A10G", 22731 * MIB, "a10g"),
]


def test_every_row_was_seen() -> None:
    """Each row has at least one device name from a real machine in the list above."""
    assert {row for _, _, row in SEEN_ON_REAL_MACHINES} == set(GPUS)


@pytest.mark.parametrize(("device_name", "memory_bytes", "row"), SEEN_ON_REAL_MACHINES)
def test_a_device_is_found_by_its_name_and_memory(
    device_name: str, memory_bytes: int, row: str
) -> None:
    """The driver's name and the reported memory lead to the right row."""
    found = find_gpu(device_name, memory_bytes)
    assert found is not None
    assert found.name == row


@pytest.mark.parametrize(
    ("device_name", "memory_bytes"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16 * GIB),
        ("NVIDIA GeForce RTX 4090 D", 24564 * MIB),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20 * GIB),
        ("NVIDIA A100-SXM4-40GB", 20 * GIB),
        ("NVIDIA GeForce RTX 3090", 12 * GIB),
        ("NVIDIA GeForce RTX 3090 Ti", 24564 * MIB),
        ("", 0),
    ],
)
def test_a_relative_is_unknown(device_name: str, memory_bytes: int) -> None:
    """A laptop card, a slice, another memory size and another model have no row."""
    assert find_gpu(device_name, memory_bytes) is None


def test_no_two_rows_claim_one_device() -> None:
    """A name with a memory size belongs to one row only, whatever the order of the rows."""
    claims = [(name, row.memory_bytes) for row in GPUS.values() for name in row.match]
    assert len(claims) == len(set(claims))
    for row in GPUS.values():
        for name in row.match:
            assert find_gpu(name, row.memory_bytes) is row


def test_figures_are_in_their_units_and_range() -> None:
    """Peaks are FLOP/s and rise with smaller types; bandwidth is B/s; every row has a source."""
    for row in GPUS.values():
        assert set(row.peak_flops) <= {"fp32", "tf32", "fp16", "bf16"}
        assert all(5e12 < peak < 1e15 for peak in row.peak_flops.values())
        assert row.peak_flops["fp16"] == max(row.peak_flops.values())
        assert row.bandwidth_bytes_per_second is not None
        assert 2e11 < row.bandwidth_bytes_per_second < 6e12
        assert 12 * GIB * 0.99 < row.memory_bytes < 150 * GIB
        assert row.source


def test_cards_without_bf16_units_have_no_bf16_peak() -> None:
    """T4 and V100 only emulate bf16, and a peak would turn that into a wrong MFU."""
    without = {row.name for row in GPUS.values() if "bf16" not in row.peak_flops}
    assert without == {"t4", "v100", "v100-32"}
