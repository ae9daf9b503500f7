"""Batches: every document once, within the budget, the same on every machine."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_gpt2.data.batching import (
    collate,
    epoch_batches,
    largest_micro_batch,
    pack,
    scoring_batches,
    split_micro_batches,
)
from accel_gpt2.plan.packing import GROUP_PADDING

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=300).map(np.array)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 400), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_document_once_within_the_budget(
    lengths: np.ndarray, budget: int, seed: int, epoch: int
) -> None:
    """An epoch holds each document once; a batch exceeds the budget only as a single document."""
    batches = epoch_batches(
        lengths, global_batch_tokens=budget, global_batch_size=None, seed=seed, epoch=epoch
    )
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or (lengths[batch] - 1).sum() <= budget


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 50))
def test_batches_of_a_number_of_documents(lengths: np.ndarray, size: int) -> None:
    """With global_batch_size every batch but one per pool has that many documents."""
    batches = epoch_batches(
        lengths, global_batch_tokens=None, global_batch_size=size, seed=0, epoch=0
    )
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    pools = -(-len(lengths) // (64 * size))
    assert sum(len(batch) != size for batch in batches) <= pools


def test_longest_document_comes_first_and_epochs_differ() -> None:
    """The first batch holds the longest document, and no two epochs have the same batches."""
    lengths = np.random.default_rng(0).integers(2, 100, size=500)
    options = {"global_batch_tokens": 400, "global_batch_size": None, "seed": 3}
    first = epoch_batches(lengths, **options, epoch=0)
    again = epoch_batches(lengths, **options, epoch=0)
    second = epoch_batches(lengths, **options, epoch=1)
    assert lengths[first[0]].max() == lengths.max()
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    composition = {frozenset(batch.tolist()) for batch in first}
    shared = composition & {frozenset(batch.tolist()) for batch in second}
    assert len(shared) <= len(composition) // 10


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, world_size=st.integers(1, 4), budget=st.integers(1, 500))
def test_micro_batches_keep_the_global_batch(
    lengths: np.ndarray, world_size: int, budget: int
) -> None:
    """Cutting for any machine keeps the documents; ranks get equal counts; padding fits."""
    batch = np.arange(len(lengths))
    steps = split_micro_batches(lengths, batch, world_size=world_size, micro_batch_tokens=budget)
    assert all(len(ranks) == world_size for ranks in steps)
    pieces = [piece for ranks in steps for piece in ranks]
    assert sorted(np.concatenate(pieces).tolist()) == batch.tolist()
    for piece in pieces:
        if len(piece) > 1:
            assert len(piece) * (lengths[piece].max() - 1) <= budget


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, world_size=st.integers(1, 4), budget=st.integers(1, 500))
def test_micro_batches_are_few_and_alike(lengths: np.ndarray, world_size: int, budget: int) -> None:
    """Filling each to the budget gives no fewer, but for one for each rank; and none could be
    smaller without one more, to a sixty-fourth."""
    everything = np.arange(len(lengths))
    steps = split_micro_batches(
        lengths, everything, world_size=world_size, micro_batch_tokens=budget
    )
    filled = scoring_batches(lengths, micro_batch_tokens=budget)
    assert len(steps) == -(-len(filled) // world_size)
    pieces = [piece for ranks in steps for piece in ranks if len(piece)]
    largest = max(len(piece) * (lengths[piece].max() - 1) for piece in pieces)
    less = int(largest * (1 - 1 / 32)) - 2
    if len(pieces) > 1 and less >= lengths.max():
        assert len(scoring_batches(lengths, micro_batch_tokens=less)) > len(steps) * world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_micro_batch_is_a_small_rest(world_size: int) -> None:
    """At the lengths of AG News the smallest of a step has over half of what the largest has."""
    lengths = np.random.default_rng(0).lognormal(3.95, 0.35, size=20_000).astype(int) + 3
    shares = []
    for batch in epoch_batches(
        lengths, global_batch_tokens=8192, global_batch_size=None, seed=0, epoch=1
    ):
        steps = split_micro_batches(lengths, batch, world_size=world_size, micro_batch_tokens=2048)
        tokens = [int((lengths[piece] - 1).sum()) for ranks in steps for piece in ranks]
        shares.append(min(tokens) / max(tokens))
    assert np.median(shares) > 0.6


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 500), seed=st.integers(0, 9), packed=st.booleans())
def test_no_micro_batch_is_larger_than_the_largest(
    lengths: np.ndarray, budget: int, seed: int, packed: bool
) -> None:
    """What is tried before the first step is at least as large as any that comes."""
    tried = largest_micro_batch(lengths, micro_batch_tokens=budget, packed=packed)
    order = np.random.default_rng(seed).permutation(len(lengths))
    for batch in np.array_split(order, 1 + len(order) // 20):
        for (piece,) in split_micro_batches(
            lengths, batch, world_size=1, micro_batch_tokens=budget, packed=packed
        ):
            if packed:
                assert (lengths[piece] - 1).sum() <= max(budget, (lengths[tried] - 1).sum())
            else:
                padded = len(piece) * (lengths[piece].max() - 1)
                assert padded <= len(tried) * (lengths[tried].max() - 1)


def test_batches_are_samples_whatever_the_lengths() -> None:
    """Long and short documents come together: the mean length of a batch differs from that of all
    no more than a random sample's does."""
    lengths = np.random.default_rng(0).lognormal(3.95, 0.35, size=20_000).astype(int) + 3
    batches = epoch_batches(
        lengths, global_batch_tokens=None, global_batch_size=50, seed=0, epoch=1
    )
    means = np.array([lengths[batch].mean() for batch in batches])
    assert means.std() == pytest.approx(lengths.std() / np.sqrt(50), rel=0.15)


def test_padding_in_pieces_of_neighbouring_lengths() -> None:
    """Of 8,192 tokens drawn at the lengths of AG News, over 80% of what pieces of 1,024 compute."""
    lengths = np.random.default_rng(0).lognormal(3.95, 0.35, size=20_000).astype(int) + 3
    computed = 0
    for batch in epoch_batches(
        lengths, global_batch_tokens=8192, global_batch_size=None, seed=0, epoch=0
    ):
        for (piece,) in split_micro_batches(lengths, batch, world_size=1, micro_batch_tokens=1024):
            computed += len(piece) * int(lengths[piece].max() - 1)
    assert 0.8 < (lengths - 1).sum() / computed < 1


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS)
def test_a_packed_row_is_laid_out_in_groups_with_little_padding(lengths: np.ndarray) -> None:
    """Each token has a place of its own in the group of its document, after the one before it, and
    padding takes no more than a eighth of the tokens."""
    documents = [np.arange(1, n + 1) for n in lengths]
    batch = pack(documents)
    shapes = [group.shape for group in batch.groups]
    assert sum(rows for rows, _, _ in shapes) == len(lengths)
    num_slots = sum(rows * longest for rows, longest, _ in shapes)
    assert len(batch.slots) == (lengths - 1).sum() <= num_slots
    assert num_slots <= (1 + GROUP_PADDING) * len(batch.slots)
    laid_out = np.zeros(num_slots, dtype=np.int64)
    laid_out[batch.slots] = batch.input_ids[0]
    rows = [
        row
        for part, (count, longest, _) in zip(
            np.split(laid_out, np.cumsum([rows * longest for rows, longest, _ in shapes])[:-1]),
            shapes,
            strict=True,
        )
        for row in part.reshape(count, longest)
    ]
    for row, document in zip(rows, documents, strict=True):
        assert np.array_equal(np.trim_zeros(row, "b"), document[:-1])


def test_collate_of_nothing_is_one_row_without_targets() -> None:
    """A rank without documents takes part with a row that predicts nothing."""
    batch = collate([])
    assert batch.input_ids.shape == (1, 1)
    assert batch.num_tokens == 0


def test_padding_is_told_by_length_not_by_token() -> None:
    """EOS as the last target counts, though its id may be that of padding."""
    batch = collate([np.array([0, 5, 0]), np.array([0, 1, 2, 3, 0])])
    assert batch.valid.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.targets[0, :2].tolist() == [5, 0]


@pytest.mark.parametrize("num_documents", [1, 10, 333])
def test_scoring_reads_every_document_once(num_documents: int) -> None:
    """Scoring batches hold each document once, longest first."""
    lengths = np.random.default_rng(1).integers(2, 50, size=num_documents)
    batches = scoring_batches(lengths, micro_batch_tokens=128)
    flat = np.concatenate(batches)
    assert sorted(flat.tolist()) == list(range(num_documents))
    assert lengths[flat[0]] == lengths.max()
