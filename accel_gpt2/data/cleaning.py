"""What is done to documents between their source and the splits: labels, duplicates, cuts.

Every choice is made by content, not by position: the same documents in another order, or on another
machine, end in the same splits. docs/data.md tells it in prose.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from accel_gpt2.data.raw import RawSplit, is_whole_number
from accel_gpt2.errors import UserError

_MAX_CLASSES = 1000
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """Something that was done to the data, or noticed in it: counted and explained."""

    kind: str
    split: str
    count: int
    example: str  # where the first one stands
    what: str  # one sentence for the report


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSplit:
    """One split with its labels as class indices and one digest per text, all of shape [documents].

    Equal texts, and only they, have equal `digests` (16 bytes: two uint64).
    """

    name: str
    raw: RawSplit
    labels: NDArray[np.int64]
    digests: NDArray[np.uint64]  # [documents, 2]
    empty: NDArray[np.bool_]  # nothing but white space

    def example(self, rows: NDArray[Any]) -> str:
        """Where the first of these rows stands, in words."""
        return self.raw.place(int(rows[0]))


def distinct_labels(splits: Sequence[RawSplit]) -> tuple[str, ...]:
    """The different labels, as text, of several splits: numbers by value, the rest by alphabet."""
    found: set[str] = set()
    for split in splits:
        found.update(pc.unique(split.table["label"]).to_pylist())
    if all(is_whole_number(label) for label in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def infer_class_names(labels: Sequence[str], place: str) -> tuple[str, ...]:
    """Class names for labels that nobody named: themselves, or "0".."C-1" for numbers.

    Raises:
        UserError: when there are too many of them, or numbers that do not count from 0.

    >>> infer_class_names(("ham", "spam"), "a.csv"), infer_class_names(("0", "1", "2"), "a.csv")
    (('ham', 'spam'), ('0', '1', '2'))
    """
    if len(labels) > _MAX_CLASSES:
        raise UserError(
            f"{place}: the label column has {len(labels):,} different values, so it is no label; "
            "name the right one with --set label_field=..."
        )
    if len(labels) > 1 and all(is_whole_number(label) for label in labels):
        wanted = [str(index) for index in range(len(labels))]
        if list(labels) != wanted:
            raise UserError(
                f"{place}: the labels are {', '.join(labels)}; numbers should count the classes "
                f"from 0 without a gap. --set class_names={','.join(labels)} takes them for names."
            )
    return tuple(labels)


def label_indices(split: RawSplit, class_names: Sequence[str]) -> NDArray[np.int64]:
    """The class index of every document.

    A label is a class name, or the number of a class: in the order of the source's own names where
    those are the same names, else in the order of `class_names`.

    Raises:
        UserError: naming the first row whose label is neither.
    """
    encoded = split.table["label"].combine_chunks().dictionary_encode()
    values: list[str] = encoded.dictionary.to_pylist()
    codes: NDArray[np.int64] = encoded.indices.to_numpy()
    mapping = _label_mapping(values, class_names, split)
    of_value = np.array([mapping.get(value, -1) for value in values], dtype=np.int64)
    indices: NDArray[np.int64] = of_value[codes]
    wrong = np.flatnonzero(indices < 0)
    if len(wrong):
        raise UserError(
            f"{split.place(int(wrong[0]))}: the label {values[codes[wrong[0]]]!r} is none of the "
            f"{len(class_names)} classes ({', '.join(class_names)}) and no number from 0 to "
            f"{len(class_names) - 1}; {len(wrong):,} of {len(codes):,} rows have such a label; "
            "correct them, or name the classes with --set class_names=..."
        )
    return indices


def _label_mapping(
    values: Sequence[str], class_names: Sequence[str], split: RawSplit
) -> dict[str, int]:
    by_name = {name: index for index, name in enumerate(class_names)}
    if all(value in by_name for value in values):
        return by_name
    if len(class_names) == 2 and set(values) <= {"False", "True"}:
        return {"False": 0, "True": 1}
    if all(is_whole_number(value) for value in values):
        order = _own_order(class_names, split)
        return {str(number): index for number, index in enumerate(order)}
    return by_name


def _own_order(class_names: Sequence[str], split: RawSplit) -> list[int]:
    """Which class a source's own class 0, 1, ... is."""
    own = [name.casefold() for name in split.class_names]
    wanted = [name.casefold() for name in class_names]
    if sorted(own) == sorted(wanted):
        return [wanted.index(name) for name in own]
    if set(own) & set(wanted):
        raise UserError(
            f"{split.place(0)}: the source calls its classes {', '.join(split.class_names)}, which "
            f"are not {', '.join(class_names)}; choose a data set with the same classes, or "
            "rename them in its classes.txt."
        )
    return list(range(len(class_names)))  # other words for the same classes, or none


def label_split(name: str, raw: RawSplit, class_names: Sequence[str]) -> LabelledSplit:
    """Labels, digests and empty documents of one split; the texts stream through."""
    digests = bytearray()
    empty: list[NDArray[np.bool_]] = []
    for batch in raw.table.select(["text"]).to_batches(max_chunksize=_BATCH_DOCUMENTS):
        texts = batch.column("text")
        for data in texts.cast(pa.large_binary()).to_pylist():
            digests += hashlib.blake2b(data, digest_size=16).digest()
        stripped = pc.binary_length(pc.utf8_trim_whitespace(texts))
        # numpy compares: where pyarrow makes a scalar of a number, it would take the exception of a
        # signal that comes just then for a number that it cannot read.
        empty.append(stripped.to_numpy(zero_copy_only=False) == 0)
    return LabelledSplit(
        name=name,
        raw=raw,
        labels=label_indices(raw, class_names),
        digests=np.frombuffer(bytes(digests), dtype="<u8").reshape(-1, 2),
        empty=np.concatenate([np.empty(0, np.bool_), *empty]),
    )


def clean_training_split(split: LabelledSplit) -> tuple[NDArray[np.int64], list[Treatment]]:
    """The rows of a training split that stay, in order, and what was removed and why.

    Empty documents go; of a text that stands there with different labels all copies go; of a text
    that stands there several times with one label the first copy stays.
    """
    treatments: list[Treatment] = []
    rows = np.arange(len(split.labels))

    def remove(out: NDArray[np.bool_], kind: str, what: str) -> None:
        nonlocal rows
        if out.any():
            gone = rows[out]
            treatments.append(
                Treatment(
                    kind=kind,
                    split=split.name,
                    count=len(gone),
                    example=split.example(gone),
                    what=what,
                )
            )
            rows = rows[~out]

    remove(
        split.empty[rows],
        "empty_document",
        "Documents without any text were removed from the training split.",
    )
    remove(
        _has_conflicting_label(split.digests[rows], split.labels[rows]),
        "conflicting_label",
        "Texts that stand in the training split with different labels were removed, all copies.",
    )
    remove(
        _is_repeated(split.digests[rows]),
        "duplicate_in_train",
        "Texts that stand in the training split more than once were kept once.",
    )
    return rows, treatments


def remove_shared_with_test(
    train: LabelledSplit, rows: NDArray[np.int64], test: LabelledSplit
) -> tuple[NDArray[np.int64], list[Treatment]]:
    """The training rows whose text does not stand in the test split."""
    texts = _text_numbers(np.concatenate([train.digests[rows], test.digests]))
    shared = np.isin(texts[: len(rows)], texts[len(rows) :])
    if not shared.any():
        return rows, []
    treatment = Treatment(
        kind="duplicate_across_splits",
        split=train.name,
        count=int(shared.sum()),
        example=train.example(rows[shared]),
        what="Training texts that also stand in the test split were removed from training.",
    )
    return rows[~shared], [treatment]


def notice_in_test(test: LabelledSplit) -> list[Treatment]:
    """What is wrong in a test split, which is never altered."""
    noticed = (
        (
            test.empty,
            "empty_document",
            "The test split holds documents without any text; they were kept.",
        ),
        (
            _is_repeated(test.digests),
            "duplicate_in_test",
            "The test split holds texts more than once; every copy was kept and counts.",
        ),
        (
            _has_conflicting_label(test.digests, test.labels),
            "conflicting_label",
            "The test split holds equal texts with different labels; they were kept.",
        ),
    )
    return [
        Treatment(
            kind=kind,
            split=test.name,
            count=int(found.sum()),
            example=test.example(np.flatnonzero(found)),
            what=what,
        )
        for found, kind, what in noticed
        if found.any()
    ]


def in_test_cut(digests: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Which documents a cut by content puts into the test split.

    It depends on each text alone: a document never changes sides when others come or go.
    """
    return digests[:, 0] < np.uint64(int(fraction * 2**64))


def split_validation(
    digests: NDArray[np.uint64],
    labels: NDArray[np.int64],
    *,
    num_validation: int,
    train_per_class: int | None,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut a validation split, stratified: the indices of (train, validation), each in order.

    Every class gives its share, at least one document, and keeps at least one; `train_per_class`
    then caps what is left of each. Which documents are taken is decided by a hash of the seed and
    the text, so it changes neither with their order nor with the version of a random generator.

    Raises:
        AssertionError: when a class has fewer than two documents.
    """
    ranks = _seeded_ranks(digests, seed)
    train: list[NDArray[np.int64]] = []
    validation: list[NDArray[np.int64]] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        assert len(members) >= 2, "checked before, with the name of the class"
        members = members[np.argsort(ranks[members], kind="stable")]
        share = round(num_validation * len(members) / len(labels))
        cut = min(max(share, 1), len(members) - 1)
        validation.append(members[:cut])
        train.append(members[cut:][:train_per_class])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(validation))


def _seeded_ranks(digests: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    key = seed.to_bytes(8, "little")
    ranks = b"".join(
        hashlib.blake2b(digest.tobytes(), digest_size=8, key=key).digest() for digest in digests
    )
    return np.frombuffer(ranks, dtype="<u8")


def content_fingerprint(
    splits: Sequence[tuple[str, NDArray[np.uint64], NDArray[np.int64]]],
) -> str:
    """A hex digest of (name, digests, labels) of several splits, equal on every machine."""
    digest = hashlib.sha256()
    for name, digests, labels in splits:
        digest.update(f"{name} {len(labels)}\n".encode())
        digest.update(digests.astype("<u8").tobytes())
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()[:32]


def _text_numbers(digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A number per document: equal texts, and only they, have the same one."""
    numbers = np.zeros(len(digests), dtype=np.int64)
    # Far faster than np.unique over pairs, which compares them one by one.
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    is_new = np.any(digests[order[1:]] != digests[order[:-1]], axis=1)
    numbers[order[1:]] = np.cumsum(is_new)
    return numbers


def _is_repeated(digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """True for every copy of a text but its first."""
    _, first = np.unique(_text_numbers(digests), return_index=True)
    repeated = np.ones(len(digests), dtype=np.bool_)
    repeated[first] = False
    return repeated


def _has_conflicting_label(
    digests: NDArray[np.uint64], labels: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """True for every copy of a text whose copies differ in their labels."""
    _, first, text = np.unique(_text_numbers(digests), return_index=True, return_inverse=True)
    differs = labels != labels[first][text]
    conflicting = np.zeros(len(first), dtype=np.bool_)
    conflicting[text[differs]] = True
    return conflicting[text]
