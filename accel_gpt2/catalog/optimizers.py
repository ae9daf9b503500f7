"""Optimizers, with what they keep in memory for each trained parameter."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """What an optimizer holds: its state all the time, temporaries during a step.

    Per element of a matrix: `state_bytes_per_parameter` for fp32 weights and
    `bf16_state_bytes_per_parameter` for bf16 ones. Tensors under `small_tensor_elements` elements
    keep fp32 moments, 8 bytes. `factored`: a matrix keeps one fp32 number for each row and column
    alone, and a vector one for each element. State of tensors of `paged_tensor_elements` elements
    or more (0: of none) lies in memory that the driver moves between the GPU and the host; without
    a GPU it is ordinary memory. The temporaries are of the largest tensor, per element; bf16
    weights are stepped as fp32 ones, one tensor at a time (`train.bf16`).
    """

    name: str
    state_bytes_per_parameter: float
    bf16_state_bytes_per_parameter: float
    small_tensor_elements: int = 0
    factored: bool = False
    paged_tensor_elements: int = 0
    step_bytes_per_parameter: float = 0.0
    bf16_step_bytes_per_parameter: float
    source: str

    def state_bytes(self, shape: Sequence[int], *, bf16: bool) -> float:
        """What one tensor's state takes, in bytes.

        >>> OPTIMIZERS["adamw"].state_bytes((768, 2304), bf16=False) / (768 * 2304)
        8.0
        >>> OPTIMIZERS["adamw_8bit"].state_bytes((768,), bf16=False) / 768
        8.0
        >>> OPTIMIZERS["adafactor"].state_bytes((768, 2304), bf16=False)
        12288.0
        """
        elements = math.prod(shape)
        if self.factored:
            return 4.0 * (sum(shape) if len(shape) > 1 else elements)
        if elements < self.small_tensor_elements:
            return 8.0 * elements
        each = self.bf16_state_bytes_per_parameter if bf16 else self.state_bytes_per_parameter
        return each * elements

    def paged_bytes(self, shape: Sequence[int], *, bf16: bool) -> float:
        """How much of `state_bytes` need not be on the GPU.

        >>> paged = OPTIMIZERS["adamw_8bit_paged"]
        >>> paged.paged_bytes((768,), bf16=False), paged.paged_bytes((1000, 100), bf16=False)
        (0.0, 200000.0)
        """
        elements = math.prod(shape)
        if not self.paged_tensor_elements or elements < self.paged_tensor_elements:
            return 0.0
        # The scales of 8-bit moments stay.
        each = self.bf16_state_bytes_per_parameter if bf16 else self.state_bytes_per_parameter
        return elements * float(int(each))


# bitsandbytes, optim/optimizer.py, get_state_buffer.
_PAGED_ELEMENTS = 100_000

_ROWS = (
    OptimizerSpec(
        name="adamw",
        state_bytes_per_parameter=8.0,
        bf16_state_bytes_per_parameter=4.0,
        # Weight, gradient and two moments in fp32.
        bf16_step_bytes_per_parameter=16.0,
        source="two moments, as wide as the weights: torch.optim.AdamW(fused=True)",
    ),
    OptimizerSpec(
        name="adamw_8bit",
        state_bytes_per_parameter=2.0 + 8.0 / 256.0,
        bf16_state_bytes_per_parameter=2.0 + 8.0 / 256.0,
        small_tensor_elements=4096,
        bf16_step_bytes_per_parameter=8.0,  # weight and gradient in fp32
        source="two 8-bit moments and one fp32 scale each per 256: bitsandbytes.optim.AdamW8bit, "
        "min_8bit_size",
    ),
    OptimizerSpec(
        name="adamw_paged",
        state_bytes_per_parameter=8.0,
        bf16_state_bytes_per_parameter=8.0,
        paged_tensor_elements=_PAGED_ELEMENTS,
        bf16_step_bytes_per_parameter=8.0,  # weight and gradient in fp32
        source="two fp32 moments, whatever the weights: bitsandbytes.optim.PagedAdamW",
    ),
    OptimizerSpec(
        name="adamw_8bit_paged",
        state_bytes_per_parameter=2.0 + 8.0 / 256.0,
        bf16_state_bytes_per_parameter=2.0 + 8.0 / 256.0,
        small_tensor_elements=4096,
        paged_tensor_elements=_PAGED_ELEMENTS,
        bf16_step_bytes_per_parameter=8.0,
        source="as AdamW8bit, its moments paged: bitsandbytes.optim.PagedAdamW8bit",
    ),
    OptimizerSpec(
        name="adafactor",
        state_bytes_per_parameter=0.0,
        bf16_state_bytes_per_parameter=0.0,
        factored=True,
        step_bytes_per_parameter=4.0,  # the update
        bf16_step_bytes_per_parameter=12.0,  # besides the weight and the gradient in fp32
        source="one row and one column vector per matrix: torch.optim.Adafactor(foreach=None)",
    ),
)

OPTIMIZERS: Mapping[str, OptimizerSpec] = MappingProxyType({row.name: row for row in _ROWS})
