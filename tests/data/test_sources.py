"""From a name to documents: where they are found, and what is done to them."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from accel_gpt2.data.cleaning import split_validation
from accel_gpt2.data.sources import (
    TextData,
    check_data_available,
    load_documents,
    load_text_data,
)
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe

CLASSES = ("cat", "dog")


def pets(count: int, start: int = 0) -> list[tuple[str, str]]:
    """Different (text, label) pairs; the labels alternate between the two classes."""
    return [
        (f"the {CLASSES[i % 2]} number {i}", CLASSES[i % 2]) for i in range(start, start + count)
    ]


def write_csv(path: Path, rows: list[tuple[str, Any]], header: str = "text,label") -> Path:
    """Rows as a CSV with every text quoted."""
    lines = [header] + ['"{}",{}'.format(t.replace('"', '""'), label) for t, label in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe(dataset: Path | str, **values: Any) -> TrainRecipe:
    """A recipe for a data set; everything else is the default."""
    return TrainRecipe(dataset=str(dataset), **values)


def _treatments(data: TextData) -> dict[tuple[str, str], int]:
    return {(x.kind, x.split): x.count for x in data.treatments}


def _all_texts(data: TextData) -> list[str]:
    return [*data.train["text"], *data.validation["text"], *data.test["text"]]


def test_the_splits_hold_every_document_once(folder: Path) -> None:
    """Without anything to treat, train and validation together are the training file, in order."""
    write_csv(folder / "train.csv", pets(40))
    write_csv(folder / "test.csv", pets(10, start=100))
    data = load_text_data(recipe(folder))
    assert sorted(_all_texts(data)) == sorted(text for text, _ in pets(40) + pets(10, start=100))
    assert data.test["text"][:] == [text for text, _ in pets(10, start=100)]
    assert data.treatments == ()
    assert data.class_names == CLASSES
    assert data.source == str(folder)
    for split in (data.train, data.validation, data.test):
        assert split.column_names == ["text", "label", "row"]
        assert split["row"][:] == sorted(split["row"])
        assert all(
            CLASSES[label] in text
            for text, label in zip(split["text"], split["label"], strict=True)
        )
    for split in (data.train, data.validation):
        assert split["text"][:] == [pets(40)[row][0] for row in split["row"]]


def test_validation_is_stratified_seeded_and_bounded() -> None:
    """Classes give their share, at least one; another seed takes others; the cap holds."""
    digests = np.random.default_rng(0).integers(0, 2**63, (1000, 2)).astype(np.uint64)
    labels = np.array([0] * 900 + [1] * 98 + [2] * 2)

    def cut(seed: int, train_per_class: int | None = None) -> tuple[set[int], set[int]]:
        train, validation = split_validation(
            digests, labels, num_validation=100, train_per_class=train_per_class, seed=seed
        )
        assert list(train) == sorted(train)
        return set(train.tolist()), set(validation.tolist())

    train, validation = cut(0)
    assert Counter(labels[list(validation)].tolist()) == {0: 90, 1: 10, 2: 1}
    assert train | validation == set(range(1000))
    assert not train & validation
    assert cut(0) == (train, validation)
    assert 0 < len(cut(1)[1] & validation) < 50
    capped, same_validation = cut(0, train_per_class=50)
    assert Counter(labels[list(capped)].tolist()) == {0: 50, 1: 50, 2: 1}
    assert same_validation == validation


def test_splits_go_by_content_not_by_order(folder: Path) -> None:
    """The same documents in reverse order end in the same splits."""
    forward = load_text_data(recipe(write_csv(folder / "a.csv", pets(60))))
    backward = load_text_data(recipe(write_csv(folder / "b.csv", pets(60)[::-1])))
    for name in ("train", "validation", "test"):
        assert sorted(getattr(forward, name)["text"]) == sorted(getattr(backward, name)["text"])
    assert len(forward.test) > 0


def test_treatments_of_both_splits_are_counted(folder: Path) -> None:
    """Each rule removes what it says from training, counts it with its first place, spares test."""
    train = [
        *pets(20),
        ("  \n", "cat"),
        ("twice", "cat"),
        ("twice", "cat"),
        ("twice", "cat"),
        ("disputed", "cat"),
        ("disputed", "dog"),
        ("disputed", "cat"),
        ("also in test", "cat"),
    ]
    test = [
        *pets(10, start=100),
        ("also in test", "cat"),
        ("again", "dog"),
        ("again", "dog"),
        ("\u00a0", "dog"),
        ("both", "cat"),
        ("both", "dog"),
    ]
    write_csv(folder / "train.csv", train)
    write_csv(folder / "test.csv", test)
    data = load_text_data(recipe(folder))
    assert _treatments(data) == {
        ("empty_document", "train"): 1,
        ("conflicting_label", "train"): 3,
        ("duplicate_in_train", "train"): 2,
        ("duplicate_across_splits", "train"): 1,
        ("empty_document", "test"): 1,
        ("duplicate_in_test", "test"): 2,
        ("conflicting_label", "test"): 2,
    }
    assert data.test["text"][:] == [text for text, _ in test]
    kept = sorted([*data.train["text"], *data.validation["text"]])
    assert kept == sorted([*(text for text, _ in pets(20)), "twice"])
    places = {x.kind: x.example for x in data.treatments if x.split == "train"}
    # The empty document spans two lines, so what follows it stands one line further down.
    assert places["empty_document"].endswith("pets/train.csv, line 22")
    assert places["duplicate_in_train"].endswith("pets/train.csv, line 25")
    assert places["duplicate_across_splits"].endswith("pets/train.csv, line 30")


def test_a_missing_test_split_is_cut_by_content(folder: Path) -> None:
    """About a fifth becomes the test split, is reported, and stays when documents are added."""
    small = load_text_data(recipe(write_csv(folder / "a.csv", pets(400))))
    assert 50 < len(small.test) < 110
    assert _treatments(small) == {("test_cut_from_train", "test"): len(small.test)}
    assert len(set(_all_texts(small))) == len(_all_texts(small)) == 400
    large = load_text_data(recipe(write_csv(folder / "b.csv", pets(800))))
    assert set(small.test["text"]) <= set(large.test["text"])
    assert not set(small.test["text"]) & {*large.train["text"], *large.validation["text"]}


def test_the_class_limit_takes_a_seeded_choice(folder: Path) -> None:
    """`train_documents_per_class` caps each class, is reported, and follows the seed."""
    path = write_csv(folder / "a.csv", pets(300))
    chosen = load_text_data(recipe(path, train_documents_per_class=20))
    assert Counter(chosen.train["label"]) == {0: 20, 1: 20}
    total = 300 - len(chosen.test) - len(chosen.validation) - 40
    assert _treatments(chosen)["above_class_limit", "train"] == total
    other = load_text_data(recipe(path, train_documents_per_class=20, seed=1))
    assert set(chosen.train["text"]) != set(other.train["text"])
    assert chosen.test["text"][:] == other.test["text"][:]


def test_a_test_split_can_be_declined(folder: Path) -> None:
    """With test_split = none every document is for training or validation, of a source without a
    test split and of one with it."""
    for name in ("alone.csv", "both/train.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        data = load_text_data(recipe(write_csv(folder / name, pets(40)), test_split="none"))
        assert sorted(_all_texts(data)) == sorted(text for text, _ in pets(40))
        assert len(data.test) == 0
        assert data.treatments == ()
    write_csv(folder / "both/test.csv", pets(10, start=100))
    assert len(load_text_data(recipe(folder / "both", test_split="none")).test) == 0


def test_a_split_that_is_not_used_is_reported(folder: Path) -> None:
    """A validation file is left alone, and the report says so."""
    for name, start in (("train", 0), ("validation", 50), ("test", 100)):
        write_csv(folder / f"{name}.csv", pets(20, start))
    data = load_text_data(recipe(folder))
    assert _treatments(data) == {("unread_file", ""): 1}
    assert data.treatments[0].example == "validation.csv"
    assert len(_all_texts(data)) == 40


def test_the_fingerprint_is_of_content(folder: Path) -> None:
    """Format and folder do not change it (nor does the machine); a letter, label or seed does."""
    rows = pets(60)
    write_csv(folder / "a.csv", rows)
    pd.DataFrame(rows, columns=["text", "label"]).to_parquet(folder / "a.parquet")
    first = load_text_data(recipe(folder / "a.csv"))
    assert first.fingerprint == load_text_data(recipe(folder / "a.parquet")).fingerprint
    assert first.fingerprint == "a835621a6c52a9cf023b06f3841d0e51"
    changed_text = [("The cat number 0", "cat"), *rows[1:]]
    changed_label = [("the cat number 0", "dog"), *rows[1:]]
    others = [
        load_text_data(recipe(write_csv(folder / "b.csv", changed_text))),
        load_text_data(recipe(write_csv(folder / "c.csv", changed_label))),
        load_text_data(recipe(folder / "a.csv", seed=1)),
    ]
    assert len({first.fingerprint, *(data.fingerprint for data in others)}) == 4


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ((0, 1), (), ("0", "1")),
        (("no", "yes"), (), ("no", "yes")),
        (("False", "True"), (), ("False", "True")),
        ((0, 1), ("no", "yes"), ("no", "yes")),
        (("False", "True"), ("no", "yes"), ("no", "yes")),
        ((1, 2), ("1", "2"), ("1", "2")),
    ],
)
def test_labels_become_indices(
    folder: Path, labels: tuple[Any, Any], names: tuple[str, ...], expected: tuple[str, str]
) -> None:
    """Numbers count classes, texts name them, booleans are the first and the second."""
    rows = [(f"document {i}", labels[i % 2]) for i in range(60)]
    data = load_text_data(recipe(write_csv(folder / "a.csv", rows), class_names=names))
    assert data.class_names == expected
    assert all(
        int(t.split()[1]) % 2 == c
        for t, c in zip(data.train["text"], data.train["label"], strict=True)
    )


def test_class_names_beside_the_files(folder: Path) -> None:
    """classes.txt names the classes in label order; the recipe wins over it."""
    write_csv(folder / "a.csv", [(f"document {i}", i % 2) for i in range(60)])
    (folder / "classes.txt").write_text("even\nodd\n")
    assert load_text_data(recipe(folder)).class_names == ("even", "odd")
    assert load_text_data(recipe(folder, class_names=("e", "o"))).class_names == ("e", "o")


@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        ([("a", 0), ("b", 1), ("c", 3)], {}, r"labels are 0, 1, 3; .* --set class_names=0,1,3"),
        ([("a", 1), ("b", 2)], {}, r"the labels are 1, 2; numbers should count the classes from 0"),
        (
            [("a", 0), ("b", 5), ("c", 1)],
            {"class_names": ("n", "y")},
            r"line 3: the label '5' is none",
        ),
        ([("a", -1), ("b", 1)], {"class_names": ("n", "y")}, r"line 2: the label '-1' is none of"),
        (
            [("a", "n"), ("b", "z")],
            {"class_names": ("n", "y")},
            r"line 3: the label 'z' is none of",
        ),
        ([("a", "n"), ("b", "n")], {}, r"has only one class, 'n'; a classifier needs at least two"),
        ([("a", "n")], {"class_names": ("n", "n")}, r"class_names = n, n: a name occurs twice"),
        (
            [(f"text {i}", f"label {i}") for i in range(1001)],
            {},
            r"has 1,001 different values, so it is no label",
        ),
    ],
)
def test_labels_that_cannot_be_used(
    folder: Path, rows: list[tuple[str, Any]], values: dict[str, Any], message: str
) -> None:
    """Gaps, strangers, numbers out of range, a single class and a column of prose are refused."""
    with pytest.raises(UserError, match=message):
        load_text_data(recipe(write_csv(folder / "a.csv", rows), **values))


def test_every_class_must_be_in_every_split(folder: Path) -> None:
    """A class without test documents, or with one for training, is an error with the counts."""
    write_csv(folder / "train.csv", pets(20))
    write_csv(folder / "test.csv", [row for row in pets(20, start=100) if row[1] == "cat"])
    with pytest.raises(UserError, match=r"split test: the class 'dog' has 0 .*cat 10, dog 0"):
        load_text_data(recipe(folder))
    write_csv(folder / "train.csv", [*[row for row in pets(20) if row[1] == "cat"], ("a", "dog")])
    write_csv(folder / "test.csv", pets(20, start=100))
    with pytest.raises(UserError, match=r"'dog' has 1 .* at least 2, one of them for validation"):
        load_text_data(recipe(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"test_split": "holdout"}, r"has no split 'holdout' \(found: train\).*--set test_split="),
        ({"train_split": "all"}, r"has no split 'all' .*--set train_split="),
        ({"test_split": "train"}, r"train_split and test_split are both 'train'"),
    ],
)
def test_splits_that_are_named_must_exist(
    folder: Path, values: dict[str, str], message: str
) -> None:
    """A split that a recipe names and the source has not got is never replaced by a cut."""
    write_csv(folder / "train.csv", pets(20))
    with pytest.raises(UserError, match=message):
        load_text_data(recipe(folder, **values))


def test_the_data_folder_is_looked_in_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A catalog name, its hub id, and a name of one's own are found under ACCEL_GPT2_DATA."""
    root = tmp_path / "data"
    for name in ("imdb", "mine"):
        (root / name).mkdir(parents=True)
        write_csv(root / name / "train_subset.csv", [(f"train {i}", i % 2) for i in range(20)])
        write_csv(root / name / "test.csv", [(f"test {i}", i % 2) for i in range(20)])
    write_csv(root / "loose.csv", pets(60))
    monkeypatch.setenv("ACCEL_GPT2_DATA", str(root))
    for name in ("imdb", "stanfordnlp/imdb"):
        check_data_available(recipe(name))
        data = load_text_data(recipe(name))
        assert (data.name, data.source) == ("imdb", str(root / "imdb"))
        assert data.class_names == ("negative", "positive")
    assert load_text_data(recipe("mine")).class_names == ("0", "1")
    assert load_text_data(recipe("loose")).source == str(root / "loose.csv")


def test_fields_of_the_catalog_are_preferences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local sms_spam with columns text and label is read although the hub calls the text sms."""
    for header in ("text,label", "sms,label"):
        folder = tmp_path / header / "sms_spam"
        folder.mkdir(parents=True)
        rows = [(f"message {i}", ("ham", "spam")[i % 2]) for i in range(60)]
        write_csv(folder / "sms_spam.csv", rows, header=header)
        monkeypatch.setenv("ACCEL_GPT2_DATA", str(tmp_path / header))
        data = load_text_data(recipe("sms_spam"))
        assert data.class_names == ("ham", "spam")
        assert len(_all_texts(data)) == 60


def test_a_known_test_split_is_never_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """imdb without its test file is an error: a cut of it would not be the IMDB test set."""
    (tmp_path / "imdb").mkdir()
    write_csv(tmp_path / "imdb" / "train.csv", [(f"train {i}", i % 2) for i in range(20)])
    monkeypatch.setenv("ACCEL_GPT2_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"has no test split .* imdb is known to come with one"):
        check_data_available(recipe("imdb"))


def test_paths_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file, a folder without data and a wrong ACCEL_GPT2_DATA are named at once."""
    with pytest.raises(UserError, match=r"There is no file or directory .*none\.csv"):
        check_data_available(recipe(tmp_path / "none.csv"))
    with pytest.raises(UserError, match=r"holds no labelled documents.*CSV, TSV, JSONL, Parquet"):
        check_data_available(recipe(tmp_path))
    monkeypatch.setenv("ACCEL_GPT2_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"ACCEL_GPT2_DATA names .*nowhere, which is no directory"):
        check_data_available(recipe("imdb"))


def test_documents_of_another_data_set(folder: Path) -> None:
    """They come untreated, whole from one file, with the run's labels."""
    rows = [("", "dog"), ("same", "cat"), ("same", "cat")]
    one_file = load_documents(str(write_csv(folder / "x.csv", rows)), "test", ("dog", "cat"))
    assert one_file["text"][:] == ["", "same", "same"]
    assert one_file["label"][:] == [0, 1, 1]
    assert one_file["row"][:] == [0, 1, 2]
    with pytest.raises(
        UserError, match=r"x\.csv, line 2: the label 'dog' is none of the 2 classes"
    ):
        load_documents(str(folder / "x.csv"), "test", ("bird", "cat"))


def test_documents_of_a_cut_split_are_those_of_training(folder: Path) -> None:
    """A data set without a test split is cut at the same place for `evaluate` as for `train`."""
    write_csv(folder / "everything.csv", pets(100))
    data = load_text_data(recipe(folder))
    assert load_documents(str(folder), "test", CLASSES)["text"][:] == data.test["text"][:]
    rest = load_documents(str(folder), "train", CLASSES)["text"][:]
    assert sorted(rest) == sorted([*data.train["text"], *data.validation["text"]])


@pytest.mark.parametrize(
    ("own", "expected"),
    [("dog\nCat\n", [1, 0]), ("feline\ncanine\n", [0, 1]), ("dog\nbird\n", None)],
)
def test_numbers_follow_the_names_of_their_source(
    folder: Path, own: str, expected: list[int] | None
) -> None:
    """Names in another order reorder the numbers; other words keep it; a mixture is refused."""
    write_csv(folder / "test.csv", [("zero", 0), ("one", 1)])
    write_csv(folder / "train.csv", [("zero", 0), ("one", 1)])
    (folder / "classes.txt").write_text(own)
    if expected is not None:
        assert load_documents(str(folder), "test", CLASSES)["label"][:] == expected
        return
    with pytest.raises(UserError, match=r"calls its classes dog, bird, which are not cat, dog"):
        load_documents(str(folder), "test", CLASSES)


_HUB_SCRIPT = """
import json, sys, time
from accel_gpt2.data.sources import check_data_available, load_documents, load_text_data
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
results = []
for dataset in sys.argv[1:]:
    recipe, started = TrainRecipe(dataset=dataset), time.perf_counter()
    try:
        check_data_available(recipe)
        data = load_text_data(recipe)
        again = load_documents(dataset, "test", ("dog", "cat"))
        results.append([data.class_names, data.fingerprint, len(data.test), again["label"][:2],
                        [t.example for t in data.treatments]])
    except UserError as error:
        results.append([str(error)])
    results[-1].append(time.perf_counter() - started)
print(json.dumps(results))
"""


def _on_the_hub(tmp_path: Path, *dataset_ids: str, **environment: str) -> tuple[list[Any], str]:
    base = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-c", _HUB_SCRIPT, *dataset_ids]
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=base | home | environment
    )
    return json.loads(done.stdout), done.stderr


def test_the_hub_and_its_cache(tmp_path: Path, hub: Any) -> None:
    """A data set is downloaded from a hub by `datasets`, and read again when the hub is gone."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    files = {}
    for split, start in (("train", 0), ("test", 100), ("validation", 200)):
        rows = pets(20, start)
        columns = {"text": [t for t, _ in rows], "label": [CLASSES.index(c) for _, c in rows]}
        path = tmp_path / f"{split}.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
        files[f"{split}-00000-of-00001.parquet"] = path.read_bytes()
    address = hub("me/pets", files)

    (online, unknown), talk = _on_the_hub(tmp_path, "me/pets", "me/none", HF_ENDPOINT=address)
    assert online[0] == list(CLASSES)
    assert online[2:-1] == [20, [1, 0], ["validation"]]
    assert "'me/none' is no data set of the catalog, no local file or directory" in unknown[0]
    assert "%|" not in talk  # no progress bar of `datasets` when none was asked for

    nowhere = "http://127.0.0.1:9"
    (cached, unreachable), _ = _on_the_hub(tmp_path, "me/pets", "imdb", HF_ENDPOINT=nowhere)
    assert cached[:-1] == online[:-1]
    for part in ("does not answer", "ACCEL_GPT2_DATA", "--model gpt2-tiny --dataset docstrings"):
        assert part in unreachable[0]
    assert max(cached[-1], unreachable[-1]) < 12  # with the retries of `datasets` 23 and more
