"""Cross-entropy over a large vocabulary without ever holding all logits.

At 8 x 1,024 tokens GPT-2's logits alone take 1.5 GiB in fp32, and autograd keeps them more than
once. Here a chunk of rows exists at a time; its gradient is formed while it is there, because it
needs nothing from later layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk_tokens: int,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T + bias)[target] over all rows, in nats, fp32.

    Equal to `F.cross_entropy(..., reduction="sum")` up to rounding. Softmax and sums are fp32; the
    matrix products run in autocast's type where autocast is on.

    Args:
        hidden: [num_tokens, n_embd], only positions that have a target.
        weight: [vocab_size, n_embd], the output head, usually tied to the embedding.
        bias: [vocab_size] or None.
        targets: [num_tokens], int64.
        chunk_tokens: rows of logits that exist at once.
        row_weights: [num_tokens], what each row counts, constants; None for 1 each.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, chunk_tokens, row_weights
    )
    return loss


def chunked_log_likelihoods(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk_tokens: int
) -> Tensor:
    """log p(target) of every row, fp32 [num_tokens]; arguments as in `chunked_cross_entropy`.

    The head's product is fp32 even under autocast: GPT-2's logits are near -100, where bf16 has
    steps of 0.5, and a document's likelihood is a sum over hundreds of them.
    """
    result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        head, head_bias = weight.float(), None if bias is None else bias.float()
        for start in range(0, len(hidden), chunk_tokens):
            stop = min(start + chunk_tokens, len(hidden))
            logits = F.linear(hidden[start:stop].float(), head, head_bias)
            log_likelihoods, _ = _exponentiate_(logits, targets[start:stop, None])
            result[start:stop] = log_likelihoods.squeeze(1)
            del logits  # before the next chunk's come
    return result


def _exponentiate_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) of every row and the row's sum of exponentials, [num_tokens, 1] both.

    In place: the exponentials, scaled so that a row's largest is 1, take the place of the logits.
    `logsumexp` would hold a second tensor of that size.
    """
    at_target = logits.gather(1, targets)
    largest = logits.amax(dim=1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
    return at_target - largest - sums.log(), sums


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The type of matrix products here; the last LayerNorm hands over fp32 even under autocast."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_tokens: int,
        row_weights: Tensor | None,
    ) -> Tensor:
        hidden_wanted, weight_wanted, bias_wanted, *_ = ctx.needs_input_grad
        anything_wanted = hidden_wanted or weight_wanted or bias_wanted
        dtype = _matmul_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            head, head_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            grad_hidden = torch.empty_like(hidden) if hidden_wanted else None
            # fp32, because it is a sum over chunks.
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_wanted else None
            grad_bias = (
                torch.zeros_like(bias, dtype=torch.float32)
                if bias is not None and bias_wanted
                else None
            )
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            for start in range(0, len(hidden), chunk_tokens):
                stop = min(start + chunk_tokens, len(hidden))
                rows = hidden[start:stop].to(dtype)
                wanted = targets[start:stop, None]
                logits = F.linear(rows, head, head_bias).float()
                log_likelihoods, sums = _exponentiate_(logits, wanted)
                losses = -log_likelihoods
                counts = None if row_weights is None else row_weights[start:stop, None].float()
                total += (losses if counts is None else counts * losses).sum()
                if not anything_wanted:
                    continue
                # d loss / d logits = softmax - one-hot, in the place of the logits.
                error = logits.div_(sums)
                error.scatter_add_(1, wanted, error.new_full((1, 1), -1.0).expand_as(wanted))
                if counts is not None:
                    error *= counts
                if grad_bias is not None:
                    grad_bias += error.sum(dim=0)
                error = error.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start:stop] = error @ head
                if grad_weight is not None and dtype == torch.float32:
                    grad_weight.addmm_(error.T, rows)
                elif grad_weight is not None:
                    grad_weight += error.T @ rows
                del logits, error  # before the next chunk's come
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = grad_outputs
        gradients: tuple[Tensor | None, ...] = ctx.gradients
        ctx.gradients = None  # scaled in place below, so a second backward must fail
        scaled = tuple(None if g is None else g.mul_(factor) for g in gradients)
        return (*scaled, None, None, None)
