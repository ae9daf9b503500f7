"""From the name of a data set to its documents, split and cleaned: the one way in.

A data set is looked for under the folder that ACCEL_GPT2_DATA names, then at a local path, then on
the Hugging Face hub; `docstrings` is made on the machine.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from accel_gpt2.catalog.datasets import DATASETS, DatasetSpec, find_dataset
from accel_gpt2.data.cleaning import (
    LabelledSplit,
    Treatment,
    clean_training_split,
    content_fingerprint,
    distinct_labels,
    in_test_cut,
    infer_class_names,
    label_split,
    notice_in_test,
    remove_shared_with_test,
    split_validation,
)
from accel_gpt2.data.docstrings import check_docstrings, read_docstrings
from accel_gpt2.data.hub import (
    HubAnswer,
    ask_hub,
    dataset_is_cached,
    is_hub_id,
    load_hub_splits,
    read_hub_split,
    why_unreachable,
)
from accel_gpt2.data.local_files import (
    DATA_VARIABLE,
    SUFFIXES,
    LocalFiles,
    check_fields,
    find_dataset_files,
    read_split,
)
from accel_gpt2.data.raw import FieldChoice, RawSplit
from accel_gpt2.errors import UserError, nearest
from accel_gpt2.recipe import TrainRecipe

if TYPE_CHECKING:  # the library takes a second, and predicting needs none of it
    import datasets

__all__ = [
    "NO_TEST_SPLIT",
    "TextData",
    "Treatment",
    "check_data_available",
    "load_documents",
    "load_text_data",
]

ALWAYS_AVAILABLE = "--model gpt2-tiny --dataset docstrings"

# What `test_split` is set to where all documents are for training, and none are for a test.
NO_TEST_SPLIT = "none"

# Of local files and hub data sets without a row in the catalog that come without a test split.
DEFAULT_TEST_FRACTION = 0.2

_MAX_NAME_CHARACTERS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class TextData:
    """Documents ready for training: disjoint splits in which every class occurs (`test` may have
    been declined with `test_split = "none"`, and is empty then).

    The splits have the columns text (string), label (int, an index into `class_names`) and row
    (int, the row in the source split, from 0). `source` says in words where they were read;
    `fingerprint` is a digest of texts, labels and splits, equal on every machine.
    """

    name: str
    class_names: tuple[str, ...]
    train: "datasets.Dataset"
    validation: "datasets.Dataset"
    test: "datasets.Dataset"
    treatments: tuple[Treatment, ...]
    source: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Location:
    """Where a data set is. Local files, else a hub id, else it is made on the machine."""

    name: str
    row: DatasetSpec | None
    local: LocalFiles | None = None
    hub_id: str | None = None

    @property
    def words(self) -> str:
        if self.local is not None:
            return str(self.local.path)
        if self.hub_id is not None:
            return f"{self.hub_id} on the Hugging Face hub"
        assert self.row is not None
        return self.row.source

    @property
    def test_fraction(self) -> float:
        """What is cut as a test split where there is none; 0 for data known to have one."""
        return DEFAULT_TEST_FRACTION if self.row is None else self.row.test_fraction


def load_text_data(recipe: TrainRecipe, *, progress: bool = False) -> TextData:
    """Read a data set, treat it, and cut what its source does not separate.

    What was done is in `treatments`, counted; docs/data.md has the rules.

    Raises:
        UserError: for data that cannot be had or used, with the file and row where there is one.
    """
    if recipe.train_split == recipe.test_split:
        raise UserError(
            f"train_split and test_split are both {recipe.train_split!r}: a test on training "
            "documents says nothing; name another split with --set test_split=..."
        )
    location = _locate(recipe.dataset)
    choice = _field_choice(location, recipe.text_field, recipe.label_field)
    raw, treatments = _read_splits(
        location, recipe.train_split, recipe.test_split, choice, progress=progress
    )
    raw_train, raw_test = raw[recipe.train_split], raw.get(recipe.test_split)
    class_names = _class_names(recipe, location, [*raw.values()])

    train = label_split(recipe.train_split, raw_train, class_names)
    train_rows, removed = clean_training_split(train)
    treatments += removed
    if recipe.test_split == NO_TEST_SPLIT:
        test, test_rows = replace(train, name=recipe.test_split), train_rows[:0]
    elif raw_test is None:
        cut = in_test_cut(train.digests[train_rows], location.test_fraction)
        test = replace(train, name=recipe.test_split)
        train_rows, test_rows = train_rows[~cut], train_rows[cut]
        treatments.append(_test_cut(location, test, test_rows))
    else:
        test = label_split(recipe.test_split, raw_test, class_names)
        test_rows = np.arange(len(test.labels))
        treatments += notice_in_test(test)
        train_rows, shared = remove_shared_with_test(train, train_rows, test)
        treatments += shared
    if recipe.test_split != NO_TEST_SPLIT:
        _require_every_class(test, test_rows, class_names, location, at_least=1)
    _require_every_class(train, train_rows, class_names, location, at_least=2)

    wanted = int(recipe.validation_fraction * len(train_rows))
    kept, held_out = split_validation(
        train.digests[train_rows],
        train.labels[train_rows],
        num_validation=max(len(class_names), min(wanted, recipe.validation_documents)),
        train_per_class=recipe.train_documents_per_class,
        seed=recipe.seed,
    )
    validation_rows, final_rows = train_rows[held_out], train_rows[kept]
    if (unused := len(train_rows) - len(kept) - len(held_out)) > 0:
        left_out = np.setdiff1d(train_rows, np.concatenate([final_rows, validation_rows]))
        treatments.append(
            Treatment(
                kind="above_class_limit",
                split=train.name,
                count=unused,
                example=train.example(left_out),
                what=(
                    "Training documents were left out, because the recipe asks for at most "
                    f"{recipe.train_documents_per_class:,} of each class."
                ),
            )
        )
    parts = (
        ("train", train, final_rows),
        ("validation", train, validation_rows),
        ("test", test, test_rows),
    )
    documents = {name: _dataset(split, rows) for name, split, rows in parts}
    return TextData(
        name=location.name,
        class_names=class_names,
        train=documents["train"],
        validation=documents["validation"],
        test=documents["test"],
        treatments=tuple(treatments),
        source=location.words,
        fingerprint=content_fingerprint(
            [(name, split.digests[rows], split.labels[rows]) for name, split, rows in parts]
        ),
    )


def load_documents(
    dataset: str,
    split: str,
    class_names: tuple[str, ...],
    *,
    text_field: str = "auto",
    label_field: str = "auto",
) -> "datasets.Dataset":
    """The documents of one split of a data set, untreated, labelled with the classes of a run.

    Columns as in `TextData`. A single file has no splits and is read whole. A data set without a
    test split is cut as in training. Labels that are numbers are matched by the source's own class
    names where these are the run's, else by position.

    Raises:
        UserError: for data that cannot be had or used, and when a class is missing.
    """
    location = _locate(dataset)
    choice = _field_choice(location, text_field, label_field)
    if location.local is not None and location.local.is_one_file:
        documents = label_split(split, read_split(location.local, "train", choice), class_names)
        rows = np.arange(len(documents.labels))
    else:
        asked = ("train", "test") if split == "train" else ("train", split)
        raw, _ = _read_splits(location, *asked, choice, progress=False)
        if "test" not in raw and split in ("train", "test"):
            documents = label_split(split, raw["train"], class_names)
            in_test = in_test_cut(documents.digests, location.test_fraction)
            rows = np.flatnonzero(in_test == (split == "test"))
        else:
            documents = label_split(split, raw[split], class_names)
            rows = np.arange(len(documents.labels))
    _require_every_class(documents, rows, class_names, location, at_least=1)
    return _dataset(documents, rows)


def check_data_available(recipe: TrainRecipe) -> None:
    """Say within seconds, also without a network, whether `load_text_data` will find the data.

    Raises:
        UserError: naming the ways on.
    """
    location = _locate(recipe.dataset)
    if location.local is not None:
        choice = _field_choice(location, recipe.text_field, recipe.label_field)
        _require_local_splits(location, recipe.train_split, recipe.test_split)
        check_fields(location.local, recipe.train_split, choice)
    elif location.hub_id is not None:
        _require_hub(location)
    else:
        check_docstrings()


def _locate(dataset: str) -> _Location:
    row = find_dataset(dataset)
    name = dataset if row is None else row.name
    if row is not None and row.hub_id is None:
        return _Location(name=name, row=row)
    if (local := find_dataset_files(dataset)) is not None:
        # A path that happens to end in a known name is still someone's own files.
        return _Location(name=name, row=row, local=local)
    path = Path(dataset).expanduser()
    if row is None and os.path.exists(path):
        raise UserError(
            f"{path} holds no labelled documents that can be read; it should be a "
            f"{', '.join(SUFFIXES)} file or a directory of them."
        )
    looks_like_path = path.suffix or dataset.startswith(("/", ".", "~"))
    if row is None and (looks_like_path or not is_hub_id(dataset)):
        raise UserError(
            f"There is no file or directory {path}; check the path, or use "
            f"{ALWAYS_AVAILABLE}, which needs no files."
        )
    return _Location(name=name, row=row, hub_id=dataset if row is None else row.hub_id)


def _field_choice(location: _Location, text_field: str, label_field: str) -> FieldChoice:
    row = location.row
    return FieldChoice(
        text=text_field,
        label=label_field,
        preferred_text=None if row is None else row.text_field,
        preferred_label=None if row is None else row.label_field,
    )


def _read_splits(
    location: _Location, train_split: str, test_split: str, choice: FieldChoice, *, progress: bool
) -> tuple[dict[str, RawSplit], list[Treatment]]:
    """The training split and, where the source has one, the test split; and what was not read."""
    if location.local is not None:
        _require_local_splits(location, train_split, test_split)
        local = location.local
        names = [name for name in (train_split, test_split) if local.files(name)]
        unread = local.unread_files(train_split, test_split)
        treatments = [_unread("file", [file.name for file in unread])] if unread else []
        return {name: read_split(local, name, choice) for name in names}, treatments
    if location.hub_id is None:
        return {train_split: read_docstrings(progress=progress)}, []

    hub_id = location.hub_id
    answer = _require_hub(location)
    splits = load_hub_splits(hub_id, reachable=answer is HubAnswer.FOUND, progress=progress)
    _require_splits(location, tuple(splits), train_split, test_split)
    names = [name for name in (train_split, test_split) if name in splits]
    others = [name for name in splits if name not in names]
    raw = {name: read_hub_split(hub_id, name, splits[name], choice) for name in names}
    return raw, [_unread("split", others)] if others else []


def _unread(kind: str, names: Sequence[str]) -> Treatment:
    return Treatment(
        kind=f"unread_{kind}",
        split="",
        count=len(names),
        example=names[0],
        what=(
            f"The source has a {kind} that is neither training nor test and was not read; "
            "validation is cut from the training split."
        ),
    )


def _require_local_splits(location: _Location, train_split: str, test_split: str) -> None:
    assert location.local is not None
    present = tuple(name for name in (train_split, test_split) if location.local.files(name))
    _require_splits(location, present, train_split, test_split)


def _require_splits(
    location: _Location, present: Sequence[str], train_split: str, test_split: str
) -> None:
    listed = ", ".join(present) or "none of them"
    if train_split not in present:
        raise UserError(
            f"{location.words} has no split {train_split!r} (found: {listed}); name the training "
            "split with --set train_split=..."
        )
    if test_split in (*present, NO_TEST_SPLIT):
        return
    if test_split != "test":
        raise UserError(
            f"{location.words} has no split {test_split!r} (found: {listed}); name the test split "
            "with --set test_split=..."
        )
    if location.test_fraction == 0:
        raise UserError(
            f"{location.words} has no test split (found: {listed}), and {location.name} is known "
            "to come with one; put its test file beside the others."
        )


def _require_hub(location: _Location) -> HubAnswer:
    """Ask the hub, once; a data set that is in the cache of `datasets` needs no answer."""
    assert location.hub_id is not None
    answer = ask_hub(location.hub_id, "dataset")
    if answer is HubAnswer.FOUND or dataset_is_cached(location.hub_id):
        return answer
    name = location.name
    if answer is HubAnswer.MISSING:
        raise UserError(
            f"{name!r} is no data set of the catalog, no local file or directory, and no data set "
            f"on the Hugging Face hub that you may read.{nearest(name, list(DATASETS))} Give a "
            f"path, a hub id, or one of {', '.join(DATASETS)}."
        )
    known = "" if location.row is not None else nearest(name, list(DATASETS))
    folder = os.environ.get(DATA_VARIABLE)
    looked_in = f" (nor under {DATA_VARIABLE}={folder})" if folder else ""
    raise UserError(
        f"The data set {name} is not on this machine{looked_in}, and the Hugging Face hub, where "
        f"it would be {location.hub_id}, {why_unreachable()}.{known} Name a folder that holds it "
        f"with {DATA_VARIABLE} (FOLDER/{name}/train.parquet and test.parquet, or .csv, .jsonl), "
        f"give a path with --dataset, or train on text that is already here: {ALWAYS_AVAILABLE}."
    )


def _class_names(
    recipe: TrainRecipe, location: _Location, splits: Sequence[RawSplit]
) -> tuple[str, ...]:
    """The recipe's, else those of classes.txt, else the catalog's, the source's, the labels'."""
    names = recipe.class_names
    if not names and location.local is not None:
        names = location.local.class_names
    if not names and location.row is not None:
        names = location.row.class_names
    names = names or splits[0].class_names
    names = names or infer_class_names(distinct_labels(splits), location.words)
    if len(names) < 2:
        raise UserError(
            f"{location.words} has only one class, {names[0]!r}; a classifier needs at least two."
        )
    longest = max(names, key=len)
    if len(longest) > _MAX_NAME_CHARACTERS:
        raise UserError(
            f"{location.words}: the label {longest[:40]!r}... has {len(longest):,} characters, so "
            "it is no name of a class; name the right column with --set label_field=..."
        )
    if len(set(names)) < len(names):
        raise UserError(
            f"class_names = {', '.join(names)}: a name occurs twice; give each class its own."
        )
    return names


def _test_cut(location: _Location, test: LabelledSplit, rows: NDArray[Any]) -> Treatment:
    return Treatment(
        kind="test_cut_from_train",
        split=test.name,
        count=len(rows),
        example=test.example(rows) if len(rows) else "",
        what=(
            f"The source has no test split; {location.test_fraction:.0%} of its documents were cut "
            "as one, chosen by a hash of the text."
        ),
    )


def _require_every_class(
    split: LabelledSplit,
    rows: NDArray[Any],
    class_names: Sequence[str],
    location: _Location,
    *,
    at_least: int,
) -> None:
    counts = np.bincount(split.labels[rows], minlength=len(class_names))
    scarce = [name for name, count in zip(class_names, counts, strict=True) if count < at_least]
    if not scarce:
        return
    need = "at least one" if at_least == 1 else f"at least {at_least}, one of them for validation"
    listed = ", ".join(f"{n} {c}" for n, c in zip(class_names, counts, strict=True))
    raise UserError(
        f"{location.words}, split {split.name}: the class {scarce[0]!r} has "
        f"{counts[class_names.index(scarce[0])]} documents and needs {need} "
        f"(documents per class: {listed}); add documents, or check the label field."
    )


def _dataset(split: LabelledSplit, rows: NDArray[Any]) -> "datasets.Dataset":
    import datasets

    table = pa.table(
        {
            "text": split.raw.table["text"],
            "label": pa.array(split.labels),
            "row": pa.array(np.arange(len(split.labels), dtype=np.int64)),
        }
    )
    # Given, because `datasets` would otherwise pickle the whole table to make one up.
    fingerprint = content_fingerprint([(split.name, split.digests, split.labels)])
    return datasets.Dataset(table, fingerprint=fingerprint).select(rows)
