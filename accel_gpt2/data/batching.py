"""Which documents make up which batch: decided by the recipe, never by the machine.

A *global batch* is what one optimizer step sees. It depends on the lengths, the seed and the epoch
alone, so one process and eight train the same model, and a resumed run needs only (epoch, batch)
to go on: nothing is replayed. A *micro batch* is what goes through one device at once; cutting a
global batch into micro batches changes rounding only.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

# Documents of similar length share a batch. They are found among this many batches of shuffled
# documents: enough for little padding, few enough that batches stay a random sample.
_POOL_BATCHES = 64

# Lengths are blurred by this much before sorting, so that a data set smaller than one pool is not
# cut into the same batches in every epoch.
_LENGTH_BLUR = 0.1


class Documents(Protocol):
    """Tokenised documents, on disk or in memory: BOS, tokens, EOS each."""

    @property
    def lengths(self) -> NDArray[Any]:
        """Tokens of each document, BOS and EOS included, shape [num_documents]."""

    def document(self, index: int) -> NDArray[Any]:
        """Token ids of one document, shape [lengths[index]]."""


def epoch_batches(
    lengths: NDArray[Any],
    *,
    global_batch_tokens: int | None,
    global_batch_size: int | None,
    seed: int,
    epoch: int,
) -> list[Indices]:
    """The global batches of one epoch: each document exactly once, in a seeded order.

    Args:
        lengths: tokens of each document, BOS and EOS included, shape [num_documents].
        global_batch_tokens: predicted tokens (length - 1 of each document) per batch at most; a
            longer document is a batch of its own. Or:
        global_batch_size: documents per batch.
        seed: of the recipe.
        epoch: from 0; each has its own order. The very first batch of epoch 0 holds the longest
            document, so that a batch that does not fit in memory shows at once, not after hours.

    >>> batches = epoch_batches(np.array([3, 9, 4, 8]), global_batch_tokens=None,
    ...                         global_batch_size=2, seed=0, epoch=0)
    >>> sorted(int(i) for batch in batches for i in batch), 1 in batches[0]
    ([0, 1, 2, 3], True)
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    predicted = np.asarray(lengths, dtype=np.int64) - 1
    if global_batch_size is not None:
        documents_per_batch = float(global_batch_size)
    else:
        assert global_batch_tokens is not None, "the recipe gives one of the two"
        mean = float(predicted.mean()) if len(predicted) else 1.0
        documents_per_batch = max(1.0, global_batch_tokens / max(1.0, mean))
    pool_size = max(1, round(_POOL_BATCHES * documents_per_batch))

    batches: list[Indices] = []
    for start in range(0, len(order), pool_size):
        pool = order[start : start + pool_size]
        blur = random.uniform(1 - _LENGTH_BLUR, 1 + _LENGTH_BLUR, size=len(pool))
        pool = pool[np.argsort(predicted[pool] * blur, kind="stable")]
        if global_batch_size is not None:
            cuts = [*range(0, len(pool), global_batch_size), len(pool)]
        else:
            cuts = _cut_by_tokens(predicted[pool], global_batch_tokens or 1)
        batches += [pool[start:end] for start, end in itertools.pairwise(cuts)]

    shuffled = [batches[i] for i in random.permutation(len(batches))]
    if epoch == 0 and shuffled:
        longest = np.maximum.reduceat(
            np.asarray(lengths)[np.concatenate(shuffled)],
            np.cumsum([0, *(len(batch) for batch in shuffled[:-1])]),
        )
        shuffled.insert(0, shuffled.pop(int(longest.argmax())))
    return shuffled


def _cut_by_tokens(tokens: Sequence[int] | Indices, budget: int) -> list[int]:
    """Where pieces begin and end, each as full as the budget allows and one document at least.

    >>> _cut_by_tokens(np.array([3, 4, 9, 2]), 7)
    [0, 2, 3, 4]
    """
    # A list and bisect: a call of numpy per piece would take most of a resumed run's first second.
    totals = [0, *np.cumsum(tokens).tolist()]
    cuts = [0]
    while cuts[-1] < len(tokens):
        start = cuts[-1]
        end = bisect.bisect_right(totals, totals[start] + budget, lo=start) - 1
        cuts.append(max(end, start + 1))
    return cuts


def _cut_padded(tokens: Sequence[int], budget: int) -> list[int]:
    """The same for documents that are padded to the first of their piece, the longest.

    >>> _cut_padded([9, 4, 3, 2], 8)
    [0, 1, 3, 4]
    """
    cuts = [0]
    while cuts[-1] < len(tokens):
        count = max(1, budget // max(1, tokens[cuts[-1]]))
        cuts.append(min(cuts[-1] + count, len(tokens)))
    return cuts


def _cut_evenly(
    cut: Callable[[Sequence[int], int], list[int]],
    tokens: Sequence[int],
    budget: int,
    world_size: int,
) -> list[int]:
    """As few pieces as the budget allows, but for one for each rank, and those as small as they
    can be, to a sixty-fourth: a small last piece takes a GPU's host as long as a large one, and a
    rank with a small piece waits for the others."""
    cuts = cut(tokens, budget)
    num_pieces = -(-(len(cuts) - 1) // world_size) * world_size
    too_small, enough = sum(tokens) // max(1, num_pieces) - 1, budget
    while num_pieces > 1 and enough - too_small > max(1, enough // 64):
        tried = cut(tokens, (too_small + enough) // 2)
        if len(tried) - 1 <= num_pieces:
            cuts, enough = tried, (too_small + enough) // 2
        else:
            too_small = (too_small + enough) // 2
    return cuts


def _longest_first(lengths: NDArray[Any], batch: Indices) -> tuple[Indices, list[int]]:
    """The batch's documents by length, and their predicted tokens."""
    by_length = batch[np.argsort(-np.asarray(lengths)[batch], kind="stable")]
    return by_length, (np.asarray(lengths, dtype=np.int64)[by_length] - 1).tolist()


def split_micro_batches(
    lengths: NDArray[Any],
    batch: Indices,
    *,
    world_size: int,
    micro_batch_tokens: int,
    packed: bool = False,
) -> list[list[Indices]]:
    """Cut a global batch for `world_size` ranks: result[accumulation step][rank] are indices.

    A micro batch holds documents of neighbouring lengths; its padded size (documents x longest) is
    at most `micro_batch_tokens`, unless one document alone is longer. A packed one has no padding.
    There are as few as that allows, of about the same size. Every rank gets the same number of
    them, because collectives need it; an empty one stands where there are fewer documents than
    ranks.
    """
    by_length, predicted = _longest_first(lengths, batch)
    cut = _cut_by_tokens if packed else _cut_padded
    cuts = _cut_evenly(cut, predicted, micro_batch_tokens, world_size)
    pieces = [by_length[start:end] for start, end in itertools.pairwise(cuts)]
    while len(pieces) % world_size:
        widest = max(range(len(pieces)), key=lambda i: len(pieces[i]))
        piece = pieces[widest]
        half = (len(piece) + 1) // 2
        pieces[widest : widest + 1] = [piece[:half], piece[half:]]
    return [pieces[i : i + world_size] for i in range(0, len(pieces), world_size)]


def largest_micro_batch(
    lengths: NDArray[Any], *, micro_batch_tokens: int, packed: bool = False
) -> Indices:
    """Neighbours by length that make as large a micro batch as a training can have, of as long
    documents as do.

    >>> chosen = largest_micro_batch(np.array([5, 7, 5, 3]), micro_batch_tokens=9)
    >>> chosen.tolist()  # two of 4 predicted tokens are more than one of 6
    [0, 2]
    """
    by_length = np.argsort(-np.asarray(lengths), kind="stable")
    predicted = np.maximum(1, np.asarray(lengths, dtype=np.int64)[by_length] - 1)
    starts = np.arange(len(by_length))
    if packed:
        totals = np.concatenate(([0], np.cumsum(predicted)))
        ends = np.searchsorted(totals, totals[:-1] + micro_batch_tokens, side="right") - 1
        ends = np.maximum(ends, starts + 1)
        tokens = totals[ends] - totals[:-1]
    else:
        counts = np.maximum(1, micro_batch_tokens // predicted)
        ends = np.minimum(starts + counts, len(by_length))
        tokens = (ends - starts) * predicted
    start = int(tokens.argmax())
    return by_length[start : ends[start]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Right-padded documents, shifted for next-token prediction; all arrays [documents, longest].

    Attention needs no mask: it is causal, and what lies right of a document's end is never
    predicted. `valid` tells real targets from padding by length, never by token id, since GPT-2's
    EOS would serve as padding too.
    """

    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    valid: NDArray[np.bool_]

    @property
    def num_tokens(self) -> int:
        """Predicted tokens: everything after BOS, EOS included, padding not counted."""
        return int(self.valid.sum())


def collate(documents: Sequence[NDArray[Any]]) -> TokenBatch:
    """Pad whole documents (BOS, tokens, EOS) to the longest.

    No document at all gives one row with nothing to predict, for a rank that has nothing to do but
    must take part in the step's collectives.

    >>> batch = collate([np.array([9, 5, 6, 9]), np.array([9, 7, 9])])
    >>> batch.input_ids.tolist(), batch.targets.tolist(), batch.num_tokens
    ([[9, 5, 6], [9, 7, 0]], [[5, 6, 9], [7, 9, 0]], 5)
    """
    longest = max((len(document) for document in documents), default=2)
    input_ids = np.zeros((max(1, len(documents)), longest - 1), dtype=np.int64)
    targets = np.zeros_like(input_ids)
    valid = np.zeros(input_ids.shape, dtype=np.bool_)
    for row, document in enumerate(documents):
        end = len(document) - 1
        input_ids[row, :end] = document[:-1]
        targets[row, :end] = document[1:]
        valid[row, :end] = True
    return TokenBatch(input_ids=input_ids, targets=targets, valid=valid)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Documents one after another in a single row, shifted for next-token prediction.

    `input_ids` and `position_ids` (from 0 in each document) are [1, num_tokens], `targets`
    [num_tokens]. `valid` [documents, longest] is True where a document has a token, in the row's
    order. A row without documents has one token and no target.
    """

    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    valid: NDArray[np.bool_]


def pack(documents: Sequence[NDArray[Any]]) -> PackedBatch:
    """Put whole documents (BOS, tokens, EOS) behind one another.

    No document at all gives, as in `collate`, a row with nothing to predict.

    >>> batch = pack([np.array([9, 5, 6, 9]), np.array([9, 7, 9])])
    >>> batch.input_ids.tolist(), batch.targets.tolist()
    ([[9, 5, 6, 9, 7]], [5, 6, 9, 7, 9])
    >>> batch.position_ids.tolist(), batch.valid.sum(axis=1).tolist()
    ([[0, 1, 2, 0, 1]], [3, 2])
    """
    inputs = [document[:-1] for document in documents] or [np.zeros(1, np.int64)]
    sizes = np.array([len(tokens) for tokens in inputs])
    targets = [document[1:] for document in documents] or [np.zeros(0, np.int64)]
    return PackedBatch(
        input_ids=np.concatenate(inputs, dtype=np.int64)[None],
        targets=np.concatenate(targets, dtype=np.int64),
        position_ids=np.concatenate([np.arange(size) for size in sizes])[None],
        valid=np.arange(sizes.max()) < sizes[:, None],
    )


def scoring_batches(lengths: NDArray[Any], *, micro_batch_tokens: int) -> list[Indices]:
    """Every document once, longest first, under the padded token budget: for evaluation."""
    by_length, predicted = _longest_first(lengths, np.arange(len(lengths), dtype=np.int64))
    cuts = _cut_padded(predicted, micro_batch_tokens)
    return [by_length[start:end] for start, end in itertools.pairwise(cuts)]
