"""A frozen linear layer in 8 bits. It needs bitsandbytes, so it is imported where that is there."""

from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor


class Int8Linear(Linear8bitLt):  # type: ignore[misc]
    """bitsandbytes' weights of LLM.int8() (Dettmers et al. 2022), multiplied in `compute_dtype`.

    Its own product rounds inputs to 8 bits too, but on a CPU not while it trains, so that a model
    would be scored by other likelihoods than it learnt; and it keeps its input for the backward
    pass, from where checkpointing cannot free it. This one keeps nothing but the weights.
    """

    compute_dtype: torch.dtype
    scale: Tensor  # of each output, [out_features]

    def settle(self, compute_dtype: torch.dtype) -> None:
        """Make what has been loaded a layer of this class."""
        self.compute_dtype = compute_dtype
        # A buffer moves with the module; what hangs on the weights stays where it was.
        self.register_buffer("scale", self.weight.SCB / 127, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the compute dtype."""
        product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x.to(self.compute_dtype), self.weight.data, self.scale, self.bias
        )
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        bias = None if bias is None else bias.to(inputs.dtype)
        return torch.nn.functional.linear(inputs, _dequantized(weight, scale, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ _dequantized(weight, scale, gradient.dtype), None, None, None


def _dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # Eight bits are exact in every dtype, and the product is rounded once.
    return weight.to(dtype).mul_(scale[:, None])
