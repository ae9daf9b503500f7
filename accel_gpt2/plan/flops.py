"""Arithmetic of a training step: what MFU is measured against, and what time is computed from."""

from dataclasses import dataclass

from accel_gpt2.catalog.gpus import GpuSpec


def train_flops_per_token(
    *,
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    context_tokens: float,
    frozen_base: bool = False,
) -> float:
    """Floating-point operations of forward and backward for one token.

    6(12 L d^2 + V d) + 12 L d T (Narayanan et al. 2021, section 3), without recomputation, so that
    MFU does not rise by checkpointing. `context_tokens` is T: the length of the sequence. Weights
    of a `frozen_base` have no gradients: 4 operations for each in place of 6.

    >>> gpt2 = dict(n_layer=12, n_embd=768, vocab_size=50257)
    >>> round(train_flops_per_token(**gpt2, context_tokens=1024) / 1e6)
    854
    """
    matrices = 12 * n_layer * n_embd**2 + vocab_size * n_embd
    return (4.0 if frozen_base else 6.0) * matrices + 12.0 * n_layer * n_embd * context_tokens


def peak_flops_per_second(
    gpu: GpuSpec | None, mixed_precision: str, *, tf32: bool = False
) -> float | None:
    """The sheet's peak for a recipe's precision; None where it is not known.

    Args:
        tf32: whether fp32 products are made in TF32, where the GPU has that.
    """
    if gpu is None:
        return None
    if tf32 and mixed_precision == "no" and "tf32" in gpu.peak_flops:
        return gpu.peak_flops["tf32"]
    return gpu.peak_flops.get(
        {"no": "fp32", "pure_bf16": "bf16"}.get(mixed_precision) or mixed_precision
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardFlops:
    """Floating-point operations of one token's way through the model, by where they are spent.

    `attention` counts the causal half only, which is what flash and efficient kernels compute.
    """

    blocks: float
    attention: float
    head: float


def forward_flops(
    *, n_layer: int, n_embd: int, vocab_size: int, context_tokens: float
) -> ForwardFlops:
    """Two for each weight, and for attention 2 L d T: two products, half of each.

    Args:
        context_tokens: the sequence length that the average token sees, sum L^2 / sum L.

    >>> gpt2 = forward_flops(n_layer=12, n_embd=768, vocab_size=50257, context_tokens=1024)
    >>> [round(flops / 1e6) for flops in (gpt2.blocks, gpt2.attention, gpt2.head)]
    [170, 19, 77]
    """
    return ForwardFlops(
        blocks=24.0 * n_layer * n_embd**2,
        attention=2.0 * n_layer * n_embd * context_tokens,
        head=2.0 * vocab_size * n_embd,
    )
