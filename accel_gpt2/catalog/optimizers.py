"""Optimizers, with what they keep in memory for each trained parameter."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """`state_bytes_per_parameter` is for fp32 parameters; factored states count as none."""

    name: str
    state_bytes_per_parameter: float
    source: str


_ROWS = (
    OptimizerSpec(
        name="adamw",
        state_bytes_per_parameter=8.0,
        source="two fp32 moments: torch.optim.AdamW",
    ),
    OptimizerSpec(
        name="adamw_8bit",
        # Tensors under 4,096 elements keep fp32 moments.
        state_bytes_per_parameter=2.0 + 8.0 / 256.0,
        source="two 8-bit moments and one fp32 scale each per 256: bitsandbytes.optim.AdamW8bit",
    ),
    OptimizerSpec(
        name="adafactor",
        state_bytes_per_parameter=0.0,
        source="one row and one column vector per matrix: torch.optim.Adafactor",
    ),
)

OPTIMIZERS: Mapping[str, OptimizerSpec] = MappingProxyType({row.name: row for row in _ROWS})
