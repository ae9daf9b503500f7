"""Arithmetic of a training step: what MFU is measured against."""


def train_flops_per_token(
    *, n_layer: int, n_embd: int, vocab_size: int, context_tokens: float
) -> float:
    """Floating-point operations of forward and backward for one token of full fine-tuning.

    6(12 L d^2 + V d) + 12 L d T (Narayanan et al. 2021, section 3), without recomputation, so that
    MFU does not rise by checkpointing. `context_tokens` is T: the length of the sequence.

    >>> gpt2 = dict(n_layer=12, n_embd=768, vocab_size=50257)
    >>> round(train_flops_per_token(**gpt2, context_tokens=1024) / 1e6)
    854
    """
    matrices = 12 * n_layer * n_embd**2 + vocab_size * n_embd
    return 6.0 * matrices + 12.0 * n_layer * n_embd * context_tokens
