"""Which documents make up which batch: decided by the recipe, never by the machine.

A *global batch* is what one optimizer step sees. It depends on the lengths, the seed and the epoch
alone, so one process and eight train the same model, and a resumed run needs only (epoch, batch)
to go on: nothing is replayed. A *micro batch* is what goes through one device at once; cutting a
global batch into micro batches changes rounding only.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from accel_gpt2.plan.cutting import cut_by_tokens, cut_evenly, cut_padded
from accel_gpt2.plan.packing import GROUP_PADDING

Indices = NDArray[np.int64]

# Raised whenever the same recipe, lengths and seed give other batches: no run goes on with them.
BATCHES_VERSION = 2


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
    """The global batches of one epoch: each document exactly once, in a seeded random order.

    No batch is chosen by length: batches of documents of one length save padding and learn less
    (docs/decisions/001-batches.md).

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
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
    if global_batch_size is not None:
        cuts = [*range(0, len(order), global_batch_size), len(order)]
    else:
        assert global_batch_tokens is not None, "the recipe gives one of the two"
        predicted = np.asarray(lengths, dtype=np.int64)[order] - 1
        cuts = cut_by_tokens(predicted.tolist(), global_batch_tokens)
    batches = [order[start:end] for start, end in itertools.pairwise(cuts)]
    if epoch == 0 and batches:
        place = int(np.flatnonzero(order == np.asarray(lengths).argmax())[0])
        batches.insert(0, batches.pop(bisect.bisect_right(cuts, place) - 1))
    return batches


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
    cut = cut_by_tokens if packed else cut_padded
    cuts = cut_evenly(cut, predicted, micro_batch_tokens, world_size)
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
    [num_tokens], `starts` [documents + 1] where each document begins in the row, and its end. A row
    without documents has one token and no target.

    Attention wants documents beside each other. Those of neighbouring lengths form a group, padded
    to its longest: `slots` [num_tokens] has each token's place in all groups after one another,
    flattened, and `groups` an array [documents, longest, 0] for each. They hold nothing: sizes
    travel as shapes, which the host knows without asking the device.
    """

    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    starts: NDArray[np.int32]
    slots: NDArray[np.int64]
    groups: tuple[NDArray[np.int64], ...]


def pack(documents: Sequence[NDArray[Any]], *, group_padding: float = GROUP_PADDING) -> PackedBatch:
    """Put whole documents (BOS, tokens, EOS) behind one another.

    No document at all gives, as in `collate`, a row with nothing to predict.

    Args:
        group_padding: of a group at most, as a share of its tokens; `math.inf` makes one group.

    >>> batch = pack([np.array([9, 5, 6, 9]), np.array([9, 7, 9])])
    >>> batch.input_ids.tolist(), batch.targets.tolist()
    ([[9, 5, 6, 9, 7]], [5, 6, 9, 7, 9])
    >>> batch.position_ids.tolist(), batch.starts.tolist()
    ([[0, 1, 2, 0, 1]], [0, 3, 5])
    >>> [group.shape for group in batch.groups], batch.slots.tolist()
    ([(1, 3, 0), (1, 2, 0)], [0, 1, 2, 3, 4])
    """
    inputs = [document[:-1] for document in documents] or [np.zeros(1, np.int64)]
    targets = [document[1:] for document in documents] or [np.zeros(0, np.int64)]
    sizes = [len(tokens) for tokens in inputs]
    slots: list[NDArray[np.int64]] = []
    groups: list[NDArray[np.int64]] = []
    num_slots = 0
    for first, end in itertools.pairwise(_group_by_length(sizes, group_padding)):
        longest = max(sizes[first:end])
        slots += [num_slots + n * longest + np.arange(x) for n, x in enumerate(sizes[first:end])]
        groups.append(np.empty((end - first, longest, 0), dtype=np.int64))
        num_slots += (end - first) * longest
    return PackedBatch(
        input_ids=np.concatenate(inputs, dtype=np.int64)[None],
        targets=np.concatenate(targets, dtype=np.int64),
        position_ids=np.concatenate([np.arange(size) for size in sizes])[None],
        starts=np.cumsum([0, *sizes], dtype=np.int32),
        slots=np.concatenate(slots),
        groups=tuple(groups),
    )


def _group_by_length(sizes: Sequence[int], most_padding: float) -> list[int]:
    """Where groups of neighbours begin and end that little padding makes equally long.

    >>> _group_by_length([9, 9, 8, 4, 4, 2], 0.125)
    [0, 3, 5, 6]
    """
    cuts = [0]
    longest = tokens = 0
    for number, size in enumerate(sizes):
        longest, tokens = max(longest, size), tokens + size
        if (number + 1 - cuts[-1]) * longest > (1 + most_padding) * tokens:
            cuts.append(number)
            longest = tokens = size
    return [*cuts, len(sizes)]


def scoring_batches(lengths: NDArray[Any], *, micro_batch_tokens: int) -> list[Indices]:
    """Every document once, longest first, under the padded token budget: for evaluation."""
    by_length, predicted = _longest_first(lengths, np.arange(len(lengths), dtype=np.int64))
    cuts = cut_padded(predicted, micro_batch_tokens)
    return [by_length[start:end] for start, end in itertools.pairwise(cuts)]
