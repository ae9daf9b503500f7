"""Cross-entropy over a large vocabulary without ever holding all logits.

At 8 x 1,024 tokens GPT-2's logits alone take 1.5 GiB in fp32, and autograd keeps them more than
once. Here a chunk of rows exists at a time; its gradient is formed while it is there, because it
needs nothing from later layers.
"""

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from accel_gpt2.catalog.gpus import FAST_HALVES

# Matrix products are fastest where rows begin at a multiple of this many elements and their number
# is one too. GPT-2's 50,257 words are 17 more than that: they get a product of their own, and rows
# of logits some space behind them (docs/log.md: 1.2x on a CPU).
_ALIGNED_WORDS = 64

_LOG2_E = math.log2(math.e)


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

    No more logits exist at once than `chunk_tokens` rows have, but they are those of more rows and
    of a part of the vocabulary. The head's product is as good as one in fp32 even under autocast:
    GPT-2's logits are near -100, where bf16 has steps of 0.5, and a document's likelihood is a sum
    over hundreds. `docs/decisions/002-loss.md` says how.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, head = hidden.float(), weight.float()
        head_bias = None if bias is None else bias.float()
        at_target = torch.linalg.vecdot(hidden, head[targets])
        if head_bias is not None:
            at_target += head_bias[targets]
        num_rows, columns = _tile(hidden, head, chunk_tokens)
        by_halves = _multiplies_by_halves(hidden.device)
        normalisers = [
            _log_sum_exp(rows, head, head_bias, columns, by_halves=by_halves)
            for rows in torch.split(hidden, num_rows)
        ]
        log_likelihoods: Tensor = at_target - torch.cat(normalisers)
    return log_likelihoods


# A product as wide as GPT-2's odd 50,257 has its rows where no vector unit likes them; parts of it
# are aligned. On a CPU they also stay in its cache until they are summed. A GPU would do nothing
# but launch kernels for so small parts.
_CPU_TILE = (1024, 512)  # rows, columns
_GPU_ROWS = 8192


def _tile(hidden: Tensor, head: Tensor, chunk_tokens: int) -> tuple[int, int]:
    """Rows and columns of logits that exist at once."""
    on_cpu = hidden.device.type == "cpu"
    num_rows = _CPU_TILE[0] if on_cpu else _GPU_ROWS
    rows_there = max(1, min(num_rows, len(hidden)))
    fitting = max(
        _ALIGNED_WORDS, chunk_tokens * len(head) // rows_there // _ALIGNED_WORDS * _ALIGNED_WORDS
    )
    return num_rows, min(fitting, _CPU_TILE[1] if on_cpu else _aligned_width(head))


def _log_sum_exp(
    rows: Tensor, head: Tensor, bias: Tensor | None, columns: int, *, by_halves: bool
) -> Tensor:
    """log sum exp of each row's logits, fp32 [rows], so many columns of them at once.

    In powers of two, which a CPU's vector units raise faster than e: the product scales them.
    """
    largest = rows.new_full((len(rows), 1), -torch.inf)
    sums = torch.zeros_like(largest)
    tile = rows.new_empty(len(rows), columns)
    halves = _halves(rows * _LOG2_E, (0, 0, 1)) if by_halves else None
    for start in range(0, len(head), columns):
        part = slice(start, start + columns)
        logits = tile[:, : len(head[part])]
        if halves is not None:
            _multiply_halves(halves, _halves(head[part], (0, 1, 0)), logits)
            if bias is not None:
                logits.add_(bias[part], alpha=_LOG2_E)
        elif bias is None:
            torch.addmm(logits, rows, head[part].T, beta=0, alpha=_LOG2_E, out=logits)
        else:
            torch.addmm(bias[part], rows, head[part].T, beta=_LOG2_E, alpha=_LOG2_E, out=logits)
        before, largest = largest, torch.maximum(largest, logits.amax(dim=1, keepdim=True))
        sums *= (before - largest).exp2_()
        sums += logits.sub_(largest).exp2_().sum(dim=1, keepdim=True)
    return (largest + sums.log2()).squeeze(1) / _LOG2_E


def _halves(matrix: Tensor, order: tuple[int, ...]) -> Tensor:
    """An fp32 [rows, width] as the fp16 number next to each of its own (0) and what is left of it,
    in fp16 too (1): [rows, len(order) x width], side by side in this order.

    Together they have 22 of fp32's 24 bits. No number here is too large for fp16: what the last
    norm lets through is at most the root of the width, times its gain.
    """
    high = matrix.half()
    low = (matrix - high).half()
    return torch.cat([low if half else high for half in order], dim=1)


def _multiply_halves(left: Tensor, right: Tensor, product: Tensor) -> None:
    """left @ right.T with fp32 sums, written into an fp32 product."""
    if left.device.type == "cuda":
        torch.mm(left, right.T, out_dtype=torch.float32, out=product)
    else:  # nowhere else is there such a product; in fp32 that of two fp16 numbers is exact
        torch.mm(left.float(), right.float().T, out=product)


@functools.cache
def _multiplies_by_halves(device: torch.device) -> bool:
    """Whether three products of fp16 halves are faster than one in fp32, and right, on a device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) not in FAST_HALVES:
        return False
    problem = halves_problem(device)
    if problem is not None:
        warnings.warn(
            "Scores multiply with the head in fp32, which is slower than by fp16 halves, since on "
            f"this GPU that {problem}.",
            stacklevel=2,
        )
    return problem is None


def halves_problem(device: torch.device) -> str | None:
    """What is wrong with products of fp16 halves on a device, as a clause; None where nothing is.

    Tried on logits near -100, with a bias, and with parts of the vocabulary of which the last is
    narrower.
    """
    generator = torch.Generator(device).manual_seed(0)
    rows, head, bias = (
        torch.randn(*size, generator=generator, device=device)
        for size in ((64, 96), (529, 96), (529,))
    )
    rows[:, 0], head[:, 0] = -100.3, 1.01
    try:
        found = _log_sum_exp(rows, head, bias, 256, by_halves=True)
    except (RuntimeError, TypeError) as error:
        return f"fails ({str(error).splitlines()[0]})"
    exact = torch.addmm(bias.double(), rows.double(), head.double().T).logsumexp(dim=1)
    # One product of fp16 numbers is off by 0.01, fp32 and this by 1e-5.
    return None if bool(((found - exact).abs() < 2e-4).all()) else "gives other values"


def _exponentiate_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) of every row and the row's sum of exponentials, [num_rows, 1] both.

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
        dtype = _matmul_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            head, head_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            grad_hidden = torch.empty_like(hidden) if hidden_wanted else None
            # fp32, because it is a sum over chunks; the first is written over what is there.
            new = torch.empty_like if len(hidden) else torch.zeros_like
            grad_weight = new(weight, dtype=torch.float32) if weight_wanted else None
            grad_bias = (
                torch.zeros_like(bias, dtype=torch.float32)
                if bias is not None and bias_wanted
                else None
            )
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            # For all chunks: a CPU's memory is zeroed, page after page, each time it is taken.
            chunk = _empty_logits(min(chunk_tokens, len(hidden)), head)
            for start in range(0, len(hidden), chunk_tokens):
                stop = min(start + chunk_tokens, len(hidden))
                rows = hidden[start:stop].to(dtype)
                wanted = targets[start:stop, None]
                logits = chunk[: stop - start]
                _write_logits(rows, head, head_bias, logits)
                error = logits.float()  # the same tensor where it is fp32
                log_likelihoods, sums = _exponentiate_(error, wanted)
                counts = None if row_weights is None else row_weights[start:stop, None].float()
                total -= (log_likelihoods if counts is None else counts * log_likelihoods).sum()
                if not (hidden_wanted or weight_wanted or bias_wanted):
                    continue
                # d loss / d logits = softmax - one-hot.
                error.div_(sums)
                error.scatter_add_(1, wanted, error.new_full((1, 1), -1.0).expand_as(wanted))
                if counts is not None:
                    error *= counts
                if grad_bias is not None:
                    grad_bias += error.sum(dim=0)
                # In the type of the products, and in rows of aligned length.
                error = logits.copy_(error)
                if grad_hidden is not None:
                    grad_hidden[start:stop] = _product(error, head)
                if grad_weight is not None:
                    _add_outer_product_(grad_weight, error, rows, kept=start > 0)
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


def _word_parts(vocab_size: int) -> list[slice]:
    """The vocabulary cut into an aligned part and what is left over.

    >>> _word_parts(50_257)
    [slice(0, 50240, None), slice(50240, 50257, None)]
    >>> _word_parts(4096), _word_parts(11)
    ([slice(0, 4096, None)], [slice(0, 11, None)])
    """
    aligned = vocab_size - vocab_size % _ALIGNED_WORDS
    parts = [slice(0, aligned), slice(aligned, vocab_size)]
    return [part for part in parts if part.start < part.stop]


def _empty_logits(num_rows: int, head: Tensor) -> Tensor:
    """[num_rows, vocab_size], in rows of aligned length and of the head's type."""
    return head.new_empty(num_rows, _aligned_width(head))[:, : len(head)]


def _aligned_width(head: Tensor) -> int:
    return -(-len(head) // _ALIGNED_WORDS) * _ALIGNED_WORDS


def _write_logits(rows: Tensor, head: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    """rows @ head.T + bias, [num_rows, vocab_size]."""
    for part in _word_parts(len(head)):
        if bias is None:
            torch.mm(rows, head[part].T, out=logits[:, part])
        else:
            torch.addmm(bias[part], rows, head[part].T, out=logits[:, part])


def _product(error: Tensor, head: Tensor) -> Tensor:
    """error @ head, [num_rows, n_embd]."""
    first, *rest = _word_parts(len(head))
    product = error[:, first] @ head[first]
    for part in rest:
        product.addmm_(error[:, part], head[part])
    return product


def _add_outer_product_(total: Tensor, error: Tensor, rows: Tensor, *, kept: bool) -> None:
    """Add error.T @ rows, [words, n_embd], to the fp32 total, or write it there."""
    for part in _word_parts(len(total)):
        if error.dtype == torch.float32:
            total[part].addmm_(error[:, part].T, rows, beta=int(kept))
        elif kept:
            total[part] += error[:, part].T @ rows
        else:
            total[part] = error[:, part].T @ rows
