"""Local files: what is read, and the sentence for each thing that can be wrong in one."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_gpt2.data.local_files import find_local_files, read_split
from accel_gpt2.data.raw import FieldChoice, RawSplit
from accel_gpt2.errors import UserError

ROWS = [
    ("plain", "a"),
    ('with "quotes", a comma and\na line break', "b"),
    ("", "a"),
    ("Ünïcödé 日本 😀\t", "b"),
    ("NA", "a"),
]


def _read(path: Path, split: str = "train", **choice: Any) -> RawSplit:
    local = find_local_files(path)
    assert local is not None
    return read_split(local, split, FieldChoice(**choice))


def _rows(split: RawSplit) -> list[tuple[str, str]]:
    return list(zip(split.table["text"].to_pylist(), split.table["label"].to_pylist(), strict=True))


def _write(path: Path, rows: list[tuple[str, str]]) -> Path:
    frame = pd.DataFrame(rows, columns=["text", "label"])
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet"])
def test_every_format_reads_what_pandas_wrote(folder: Path, suffix: str) -> None:
    """Quotes, line breaks, empty texts, other scripts and the word NA come back unchanged."""
    assert _rows(_read(_write(folder / f"x{suffix}", ROWS))) == ROWS


def test_a_byte_order_mark_and_windows_lines_are_read(folder: Path) -> None:
    """A CSV as a spreadsheet saves it has the same columns and texts."""
    (folder / "x.csv").write_bytes("\ufefftext,label,id\r\none,a,1\r\ntwo,b,2\r\n".encode())
    assert _rows(_read(folder / "x.csv")) == [("one", "a"), ("two", "b")]


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0")),
            st.sampled_from("ab"),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=40, deadline=None)
def test_any_text_survives_csv_and_json(rows: list[tuple[str, str]]) -> None:
    """Whatever Python's writers put into a file is read back, character by character."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        buffer = io.StringIO(newline="")
        csv.writer(buffer).writerows([("text", "label"), *rows])
        as_csv, as_json = Path(name) / "x.csv", Path(name) / "x.jsonl"
        as_csv.write_bytes(buffer.getvalue().encode())
        as_json.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in rows))
        assert _rows(_read(as_csv)) == rows
        assert _rows(_read(as_json)) == rows


def test_places_are_lines_of_text_files_and_rows_of_parquet(folder: Path) -> None:
    """A document after one with a line break is named by the line on which it begins."""
    assert _read(_write(folder / "x.csv", ROWS)).place(2).endswith("pets/x.csv, line 5")
    assert _read(_write(folder / "x.jsonl", ROWS)).place(2).endswith("pets/x.jsonl, line 3")
    assert _read(_write(folder / "x.parquet", ROWS)).place(2).endswith("pets/x.parquet, row 2")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1], ["0", "1"]),
        ([0.0, 1.0], ["0", "1"]),
        ([False, True], ["False", "True"]),
        (["no", "yes"], ["no", "yes"]),
        (pd.Categorical(["no", "yes"]), ["no", "yes"]),
    ],
)
def test_label_types_of_parquet(folder: Path, values: Any, expected: list[str]) -> None:
    """Integers, whole floats, booleans, strings and categories are labels."""
    pd.DataFrame({"text": ["one", "two"], "label": values}).to_parquet(folder / "x.parquet")
    assert _read(folder / "x.parquet").table["label"].to_pylist() == expected


def test_label_types_of_json(folder: Path) -> None:
    """JSON numbers and booleans become the same label texts as Parquet's."""
    lines = [{"text": "t", "label": label} for label in (0, 1.0, True, " no ")]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert _read(folder / "x.jsonl").table["label"].to_pylist() == ["0", "1", "True", "no"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"text,label\na,1\nb,2,3\n", r"x\.csv, line 3: 3 fields where the header has 2"),
        ("x.csv", b"text,label\na,1\nb\n", r"x\.csv, line 3: 1 fields where the header has 2"),
        ("x.csv", b"text,label\na,1\nb,\n", r"x\.csv, line 3: the label 'label' is missing"),
        ("x.csv", b"text,label\na,1\n\xff\xfe,1\n", r"x\.csv, line 3: byte 0xff is not UTF-8"),
        ("x.csv", b'text,label\na,1\n"b,1\nc,1\n', r"x\.csv, line 3: unexpected end of data"),
        ("x.csv", b'text,label\na,1\n"b"c,1\n', r"x\.csv, line 3: .*quoted field must be doubled"),
        ("x.csv", b"text,text\na,1\n", r"x\.csv, line 1: two columns have the same name"),
        ("x.csv", b"", r"x\.csv is empty; its first line should name the columns"),
        ("x.csv", b"text,label\n", r"x\.csv holds no documents"),
        ("x.csv", b"text,colour\na,1\n", None),
        (
            "x.csv",
            b"one,two,three\na,b,1\n",
            r"columns 'one', 'two', 'three', .* --set text_field=",
        ),
        ("x.csv", b"said,who\na,1\n", r"columns 'said', 'who', .* --set text_field="),
        ("x.jsonl", b'{"text":"a","label":1}\n{oops}\n', r"x\.jsonl, line 2: this is not JSON"),
        ("x.jsonl", b'{"text":"a","label":1}\n[1]\n', r"line 2: this is an array; each line"),
        ("x.jsonl", b'{"text":"a","label":1}\n{"text":"b"}\n', r"line 2: there is no 'label'"),
        ("x.jsonl", b'{"text":"a","label":1}\n{"text":null,"label":1}', r"line 2: .* is null, not"),
        ("x.jsonl", b'{"text":"a","label":1}\n{"text":5,"label":1}', r"line 2: .*'text' is 5, not"),
        ("x.jsonl", b'{"text":"a","label":null}', r"line 1: the label 'label' is missing"),
        (
            "x.jsonl",
            b'{"text":"a","label":0.5}',
            r"line 1: the label 'label' is 0\.5; it should be",
        ),
        ("x.jsonl", b'{"text":"a","label":[1]}', r"line 1: the label 'label' is an array"),
        ("x.jsonl", b'{"text":"\\ud800","label":1}', r"line 1: the text holds half of a surrogate"),
        ("x.jsonl", b"\n \n", r"x\.jsonl holds no documents"),
        ("x.json", b'[\n{"text":"a","label":1}]', r"x\.json, line 1: this is not JSON"),
        ("x.parquet", b"PAR1 no", r"x\.parquet is not a Parquet file that can be read"),
        ("classes.txt", b"a\na\n", r"classes\.txt names a class twice"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_place(
    folder: Path, name: str, content: bytes, message: str | None
) -> None:
    """Each fault ends in a sentence with the file and the line; an odd but clear file is read."""
    (folder / name).write_bytes(content)
    if name == "classes.txt":
        (folder / "x.csv").write_text("text,label\na,a\n")
        name = "x.csv"
    if message is None:
        assert _rows(_read(folder / name)) == [("a", "1")]
        return
    with pytest.raises(UserError, match=message):
        _read(folder / name)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", None], "label": [0, 1]}, r"x\.parquet, row 1: the text 'text' is missing"),
        (
            {"text": ["a", "b"], "label": pa.array([0, None])},
            r"x\.parquet, row 1: the label 'label' is missing",
        ),
        (
            {"text": ["a", "b"], "label": [0.0, 0.5]},
            r"x\.parquet, row 1: the label 'label' is 0\.5, which is not a whole number",
        ),
        (
            {"text": ["a", "b"], "label": [0.0, float("nan")]},
            r"x\.parquet, row 1: the label 'label' is nan",
        ),
        ({"text": [1, 2], "label": [0, 1]}, r"the text 'text' is of the type int64, not text"),
        (
            {"text": ["a", "b"], "label": [[0], [1]]},
            r"the label 'label' is of the type list.*--set label_field",
        ),
    ],
)
def test_what_is_wrong_in_parquet_is_said_with_its_row(
    folder: Path, columns: dict[str, Any], message: str
) -> None:
    """Missing values and types that cannot be used end in a sentence with the file and the row."""
    pq.write_table(pa.table(columns), folder / "x.parquet")
    with pytest.raises(UserError, match=message):
        _read(folder / "x.parquet")


def test_parquet_text_that_is_not_utf8_is_found(folder: Path) -> None:
    """Parquet takes any bytes for text; the row that is no UTF-8 is named."""
    bad = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.array([0, 1, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xfe")],
    )
    pq.write_table(pa.table({"text": bad, "label": [0, 1]}), folder / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet, row 1: byte 0xff is not UTF-8"):
        _read(folder / "x.parquet")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.csv", "test.csv"),
        ("train_subset.csv", "test.csv"),
        ("train-00000-of-00001.csv", "test-00000-of-00001.csv"),
        ("Train.csv", "TEST.csv"),
        ("training.csv", "test.csv"),
        ("everything.csv", "test.csv"),
        ("train/part-1.csv", "test/part-1.csv"),
        ("plain_text/train-00000-of-00001.csv", "plain_text/test-00000-of-00001.csv"),
    ],
)
def test_splits_are_told_by_names(folder: Path, train: str, test: str) -> None:
    """The names that people and tools give to files of splits are understood."""
    for name, text in ((train, "for training"), (test, "for testing"), ("dev.csv", "neither")):
        (folder / name).parent.mkdir(exist_ok=True)
        _write(folder / name, [(text, "a")])
    assert _rows(_read(folder)) == [("for training", "a")]
    assert _rows(_read(folder, "test")) == [("for testing", "a")]
    local = find_local_files(folder)
    assert local is not None
    assert [file.name for file in local.unread_files("train", "test")] == ["dev.csv"]


def test_a_directory_of_files_is_one_training_split(folder: Path) -> None:
    """Files without a split's name are read in the order of their names, whatever their format."""
    _write(folder / "b.jsonl", [("second", "b")])
    _write(folder / "a.csv", [("first", "a")])
    (folder / "notes.md").write_text("not data")
    (folder / ".hidden.csv").write_text("not data")
    assert _rows(_read(folder)) == [("first", "a"), ("second", "b")]
    assert _read(folder).place(1).endswith("pets/b.jsonl, line 1")


def test_a_split_of_another_name_is_found_by_its_file(folder: Path) -> None:
    """A split that a recipe names is the file of that name."""
    _write(folder / "train.csv", [("one", "a")])
    _write(folder / "holdout-2.csv", [("two", "b")])
    assert _rows(_read(folder, "holdout")) == [("two", "b")]


def test_fields_that_are_named_are_used(folder: Path) -> None:
    """A given or preferred field wins over a usual one; a wrong one is answered with a list."""
    (folder / "x.csv").write_text("text,label,body,mood\nno,0,yes,1\n")
    assert _rows(_read(folder / "x.csv", text="body", label="mood")) == [("yes", "1")]
    preferred = {"preferred_text": "body", "preferred_label": "nowhere"}
    assert _rows(_read(folder / "x.csv", **preferred)) == [("yes", "0")]
    with pytest.raises(UserError, match=r"no column 'bodi'; it has 'text', .*--set text_field="):
        _read(folder / "x.csv", text="bodi")


def test_nothing_readable_is_none(folder: Path) -> None:
    """A missing path, another kind of file and a directory without data are no data set."""
    (folder / "x.md").write_text("text,label")
    assert [find_local_files(p) for p in (folder, folder / "x.md", folder / "none.csv")] == [
        None
    ] * 3


def test_a_changed_file_is_read_again(folder: Path) -> None:
    """The cache of parsed files goes by content: a change shows, also of equal length."""
    path = _write(folder / "x.csv", [("one", "a")])
    assert _rows(_read(path)) == [("one", "a")]
    _write(path, [("two", "a")])
    assert _rows(_read(path)) == [("two", "a")]


def test_a_field_of_ten_megabytes_is_read(folder: Path) -> None:
    """The csv module's limit on fields does not stop a long document."""
    _write(folder / "x.csv", [("word " * 2_000_000, "a")])
    assert len(_rows(_read(folder / "x.csv"))[0][0]) == 10_000_000
