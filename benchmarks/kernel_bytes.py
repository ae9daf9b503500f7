"""Bytes that the kernels of a block of GPT-2 read and write, matrix products left out.

    python benchmarks/kernel_bytes.py

Counts forward and backward kernel by kernel, for each token and unit of n_embd: of three blocks
less two, and of four documents less two, so that what is once for all tokens falls away. It is the
table `_KERNELS` of plan/step_time.py, and what dropout and gelu_new add. CUDA's autocast computes
LayerNorm and powers in fp32, which the CPU's does not, so the model is told to.
"""

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2Model

_LENGTH, _WIDTH = 64, 128
_NOT_COUNTED = ("mm", "addmm", "bmm", "_scaled_dot_product", "empty", "new_empty", "_unsafe_view")


class _Counter(TorchDispatchMode):
    """Adds up what each kernel reads and writes."""

    num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not func._opname.startswith(_NOT_COUNTED):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.num_bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


class _Fp32LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            weight, bias = self.weight, self.bias
            return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)


class _Fp32PowerGelu(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            cubed = torch.pow(input.float(), 3.0)
            inner = math.sqrt(2.0 / math.pi) * (input + 0.044715 * cubed)
            return 0.5 * input * (1.0 + torch.tanh(inner))


def _bytes(
    n_layer: int, documents: int, *, autocast: bool, dtype: torch.dtype, dropout: float, gelu: str
) -> int:
    config = GPT2Config(
        n_layer=n_layer,
        n_embd=_WIDTH,
        n_head=2,
        vocab_size=64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        activation_function=gelu,
        use_cache=False,
    )
    model = GPT2Model(config).to(dtype)
    if autocast:
        for module in list(model.modules()):
            if isinstance(module, nn.LayerNorm):
                module.__class__ = _Fp32LayerNorm
            if gelu == "gelu_new" and hasattr(module, "act"):
                module.act = _Fp32PowerGelu()
    counter = _Counter()
    with counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model(torch.zeros(documents, _LENGTH, dtype=torch.long)).last_hidden_state
        hidden.sum().backward()
    return counter.num_bytes


def _per_token(**options: Any) -> float:
    few, many = (_bytes(3, n, **options) - _bytes(2, n, **options) for n in (2, 4))
    return (many - few) / (2 * _LENGTH * _WIDTH)


if __name__ == "__main__":
    for name, autocast, dtype in (
        ("no", False, torch.float32),
        ("bf16", True, torch.float32),
        ("pure_bf16", False, torch.bfloat16),
    ):
        for gelu, dropout in (
            ("gelu_pytorch_tanh", 0),
            ("gelu_pytorch_tanh", 0.1),
            ("gelu_new", 0),
        ):
            count = _per_token(autocast=autocast, dtype=dtype, dropout=dropout, gelu=gelu)
            sys.stdout.write(f"{name:<9} {gelu:<17} dropout {dropout:<3}: {count:.0f} bytes\n")
