"""Data files that are not what they should be, through `launch/train.py`."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fuzz.harness import (
    Case,
    Content,
    check_case,
    good_csv,
    good_rows,
    train_argv,
)


def one_file(name: str, content: Content, said: str, id: str, *more: str) -> Case:
    """A data set of a single file."""
    return Case(
        id=f"{id}-{name.rpartition('.')[2]}",
        argv=train_argv(f"data/{name}", *more),
        files={f"data/{name}": content},
        said=said,
    )


def folder(files: dict[str, Content], said: str, id: str, *more: str) -> Case:
    """A data set of several files in one folder."""
    return Case(
        id=id,
        argv=train_argv("data", *more),
        files={f"data/{name}": content for name, content in files.items()},
        said=said,
    )


def jsonl(*records: object) -> str:
    """Records, one a line."""
    return "".join(f"{json.dumps(record)}\n" for record in records)


def good_records() -> list[dict[str, str]]:
    """`good_rows` as records."""
    return [{"text": text, "label": label} for text, label in good_rows()]


def parquet(columns: dict[str, Any]) -> Callable[[Path], None]:
    """A Parquet file of these columns."""
    return lambda path: pq.write_table(pa.table(columns), path)


def damaged_parquet(damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A good Parquet file with its bytes changed."""

    def write(path: Path) -> None:
        texts, labels = zip(*good_rows(), strict=True)
        pq.write_table(pa.table({"text": texts, "label": labels}), path, compression="none")
        path.write_bytes(damage(path.read_bytes()))

    return write


def link_to(target: str) -> Callable[[Path], None]:
    """A symbolic link."""
    return lambda path: path.symlink_to(target)


def dangling_folder(path: Path) -> None:
    """A folder whose training file is a link to nowhere."""
    path.symlink_to("nowhere.csv")


TEXTS = [text for text, _ in good_rows()]
LABELS = [label for _, label in good_rows()]
NUMBERS = [0, 1] * 30

NOT_TEXT: dict[str, bytes] = {
    "nul-bytes": b"\0" * 4096,
    "random-bytes": bytes(range(256)) * 20,
    "utf-16": good_csv().encode("utf-16"),
    "latin-1": "text,label\ncaf\u00e9 cr\u00e8me,fruit\n".encode("latin-1"),
    "an-image": b"\x89PNG\r\n\x1a\n" + bytes(200),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(100),
}

TEXT_FORMATS = ("csv", "tsv", "jsonl", "json", "ndjson")

CASES: list[Case] = [
    *(
        one_file(f"x.{suffix}", data, r"UTF-8|JSON|text and the label|columns? |line 1", id)
        for id, data in NOT_TEXT.items()
        for suffix in ("csv", "jsonl")
    ),
    *(
        one_file(f"x.{suffix}", content, r"is empty|holds no documents|not a Parquet|not JSON", id)
        for suffix in (*TEXT_FORMATS, "parquet")
        for id, content in {
            "empty": b"",
            "blank-lines": b"\n\n\n",
            "only-bom": b"\xef\xbb\xbf",
        }.items()
    ),
    # CSV and TSV.
    one_file("x.csv", "text,label\n", r"no documents", "header-only"),
    one_file("x.csv", "text\nhello\n", r"cannot be told", "one-column"),
    one_file("x.csv", "a,b,c\n1,2,3\n", r"which of them hold the text", "unknown-columns"),
    one_file("x.csv", "text,text\na,b\n", r"two columns have the same name", "same-column-twice"),
    one_file("x.csv", "label,label\na,b\n", r"two columns have the same name", "two-labels"),
    one_file("x.csv", ",\na,b\n", r"same name|cannot be told", "nameless-columns"),
    one_file(
        "x.csv", "text,label\na,b,c\n", r"line 2: 3 fields where the header has 2", "too-wide"
    ),
    one_file("x.csv", "text,label\nalone\n", r"line 2: 1 fields?", "too-narrow"),
    one_file("x.csv", 'text,label\n"open,fruit\n', r"line 2: .*quote", "quote-not-closed"),
    one_file("x.csv", 'text,label\n"a"b,fruit\n', r"line 2: .*quote", "stray-quote"),
    one_file("x.csv", 'text,label\n"' + "x" * 300_000, r"line 2: .*quote", "huge-open-field"),
    one_file("x.csv", "text,label\na,\n", r"line 2: the label 'label' is missing", "no-label"),
    one_file(
        "x.csv", "text,label\na,   \n", r"line 2: the label 'label' is missing", "blank-label"
    ),
    one_file("x.csv", good_csv().replace(",", ";"), r"columns? 'text;label'", "semicolons"),
    one_file("x.tsv", good_csv(), r"columns? 'text,label'", "commas"),
    one_file(
        "x.csv", good_csv().replace(",tools", ",fruit"), r"only one class, 'fruit'", "one-class"
    ),
    one_file("x.csv", good_csv() + "a pear,\0\n", r"label|line 62", "nul-label"),
    one_file("x.csv", "text,label\n" + "the same,fruit\n" * 50, r"only one class", "one-text"),
    one_file(
        "x.csv",
        "text,label\n" + "the same,fruit\nthe same,tools\n" * 20,
        r"'fruit' has 0 documents",
        "every-text-conflicts",
    ),
    one_file(
        "x.csv", "text,label\n" + " ,fruit\n ,tools\n" * 20, r"has 0 documents", "all-texts-empty"
    ),
    one_file(
        "x.csv", "text,label\nan apple,fruit\na nail,tools\n", r"needs at least", "two-documents"
    ),
    one_file(
        "x.csv",
        good_csv() + "a lonely saw,other\n",
        r"'other' has \d documents? and needs",
        "a-class-of-one",
    ),
    one_file(
        "x.csv",
        "text,label\n" + "".join(f"text {i},class {i}\n" for i in range(1200)),
        r"1,200 different values, so it is no label",
        "a-class-per-document",
    ),
    one_file(
        "x.csv",
        good_csv().replace(",fruit", ",1").replace(",tools", ",3"),
        r"numbers should count the classes from 0",
        "numbers-with-a-gap",
    ),
    one_file(
        "x.csv",
        good_csv().replace(",fruit", "," + "9" * 5000).replace(",tools", ",1"),
        r"5,000 characters, so it is no name",
        "gigantic-number",
    ),
    one_file(
        "x.csv",
        good_csv().replace(",fruit", ",-1").replace(",tools", ",0"),
        r"numbers should count the classes",
        "negative-number",
    ),
    one_file("x.csv", good_csv(), r"no column 'nope'", "wrong-text-field", "--set=text_field=nope"),
    one_file("x.csv", good_csv(), r"no column ''", "empty-label-field", "--set=label_field="),
    one_file("x.csv", good_csv(), r"cannot be told", "same-field-twice", "--set=label_field=text"),
    one_file(
        "x.csv", good_csv(), r"none of the 2 classes", "other-names", "--set=class_names=cat,dog"
    ),
    one_file("x.csv", good_csv(), r"only one class", "one-name", "--set=class_names=fruit"),
    one_file(
        "x.csv", good_csv(), r"a name occurs twice", "name-twice", "--set=class_names=fruit,fruit"
    ),
    one_file(
        "x.csv",
        good_csv(),
        r"'more' has 0 documents",
        "a-name-too-many",
        "--set=class_names=fruit,tools,more",
    ),
    one_file("x.csv", good_csv(), r"no split 'dev'", "no-such-split", "--set=train_split=dev"),
    one_file("x.csv", good_csv(), r"no split 'dev'", "no-such-test", "--set=test_split=dev"),
    one_file("x.csv", good_csv(), r"both 'train'", "train-is-test", "--set=test_split=train"),
    one_file(
        "x.csv",
        good_csv(),
        r"train_split = '': a name is needed",
        "nameless-split",
        "--set=train_split=",
    ),
    one_file(
        "x.csv",
        "text,la\x1b[31mbel\n\x1b]0;title\x07,b\n",
        r"has the columns|cannot be told|only one class",
        "terminal-escapes",
    ),
    one_file(
        "x.csv",
        good_csv() + "evil,\x1b[2J\x1b[31mred\n",
        r"needs at least",
        "escape-in-a-label",
    ),
    one_file(
        "x.csv",
        ",".join(f"column{i}" for i in range(5000)) + "\n",
        r"cannot be told",
        "five-thousand-columns",
    ),
    one_file("x.csv", "y" * 100_000 + ",z\n1,2\n", r"cannot be told", "endless-column-name"),
    one_file(
        "x.csv",
        good_csv() + "a saw," + "l" * 50_000 + "\n",
        r"50,000 characters, so it is no name",
        "endless-label",
    ),
    # JSON lines.
    one_file("x.jsonl", "{}\n", r"columns|cannot be told", "empty-object"),
    one_file("x.jsonl", "[1, 2]\n", r"line 1: this is an array", "array"),
    one_file("x.jsonl", "null\n", r"line 1: this is null", "null"),
    one_file("x.jsonl", '"text"\n', r"line 1: this is 'text'", "string"),
    one_file("x.jsonl", "NaN\n", r"line 1: this is nan", "nan"),
    one_file("x.jsonl", "{'text': 'a'}\n", r"line 1: this is not JSON", "single-quotes"),
    one_file("x.jsonl", '{"text": "a", "label": \n', r"line 1: this is not JSON", "cut-short"),
    one_file("x.jsonl", "[" * 100_000 + "\n", r"line 1: .*JSON", "nested-too-deep"),
    one_file("x.jsonl", '{"a":' * 50_000 + "\n", r"line 1: .*JSON", "objects-too-deep"),
    one_file(
        "x.jsonl", '{"text": "a", "label": ' + "1" * 10_000 + "}\n", r"line 1: ", "gigantic-integer"
    ),
    one_file("x.json", json.dumps(good_records(), indent=1), r"line 1: .*JSON", "pretty-printed"),
    *(
        one_file(
            "x.jsonl",
            jsonl(*good_records(), {"text": "a pear", "label": value}),
            said,
            f"label-{id}",
        )
        for id, value, said in (
            ("null", None, r"line 61: the label 'label' is missing"),
            ("nan", float("nan"), r"line 61: the label 'label' is nan"),
            ("infinite", float("inf"), r"line 61: the label 'label' is inf"),
            ("broken", 1.5, r"line 61: the label 'label' is 1\.5"),
            ("list", [1], r"line 61: the label 'label' is an array"),
            ("object", {"a": 1}, r"line 61: the label 'label' is an object"),
            ("empty", "", r"line 61: the label 'label' is missing"),
            ("true", True, r"needs at least|none of"),
            ("huge", 10**30, r"needs at least|none of"),
            ("surrogate", "\ud83d", r"line 61: .*surrogate"),
        )
    ),
    *(
        one_file(
            "x.jsonl", jsonl(*good_records(), {"text": value, "label": "fruit"}), said, f"text-{id}"
        )
        for id, value, said in (
            ("null", None, r"line 61: the text 'text' is null"),
            ("number", 7, r"line 61: the text 'text' is 7"),
            ("list", ["a"], r"line 61: the text 'text' is an array"),
            ("object", {"a": "b"}, r"line 61: the text 'text' is an object"),
            ("surrogate", "half \udc00", r"line 61: .*surrogate"),
            ("true", True, r"line 61: the text 'text' is True"),
        )
    ),
    one_file(
        "x.jsonl",
        jsonl(*good_records(), {"label": "fruit"}),
        r"line 61: there is no 'text'",
        "text-missing",
    ),
    one_file(
        "x.jsonl",
        jsonl(*good_records(), {"text": "a"}),
        r"line 61: there is no 'label'",
        "label-missing",
    ),
    one_file(
        "x.jsonl",
        jsonl(*good_records(), {f"k{i}": i for i in range(20_000)}),
        r"line 61: there is no 'text'",
        "twenty-thousand-keys",
    ),
    one_file("x.jsonl", jsonl({"k" * 90_000: 1, "j": 2}), r"cannot be told", "endless-key"),
    # Parquet.
    one_file("x.parquet", b"PAR1", r"not a Parquet file", "magic-only"),
    one_file("x.parquet", good_csv(), r"not a Parquet file", "a-csv-in-disguise"),
    one_file("x.parquet", damaged_parquet(lambda b: b[:-4] + b"XXXX"), r"not a Parquet", "magic"),
    one_file("x.parquet", damaged_parquet(lambda b: b[: len(b) // 2]), r"not a Parquet", "half"),
    one_file("x.parquet", damaged_parquet(lambda b: b[:-1]), r"not a Parquet", "one-byte-short"),
    one_file(
        "x.parquet",
        damaged_parquet(lambda b: b[:4] + bytes(len(b) - 200) + b[-196:]),
        r"x\.parquet",
        "zeroed-pages",
    ),
    one_file(
        "x.parquet",
        damaged_parquet(lambda b: b[:-8] + b"\xff\xff\xff\x7f" + b[-4:]),
        r"not a Parquet",
        "footer-too-long",
    ),
    one_file("x.parquet", parquet({"text": [], "label": []}), r"no documents|type null", "no-rows"),
    one_file("x.parquet", parquet({"text": TEXTS}), r"cannot be told", "no-label"),
    one_file("x.parquet", parquet({"text": NUMBERS, "label": NUMBERS}), r"not text", "text-int"),
    one_file(
        "x.parquet",
        parquet({"text": [[t] for t in TEXTS], "label": NUMBERS}),
        r"not text",
        "text-nested",
    ),
    one_file(
        "x.parquet",
        parquet({"text": [{"a": t} for t in TEXTS], "label": NUMBERS}),
        r"not text",
        "text-struct",
    ),
    one_file(
        "x.parquet",
        parquet({"text": [t.encode() for t in TEXTS], "label": NUMBERS}),
        r"not text",
        "text-bytes",
    ),
    one_file(
        "x.parquet",
        parquet({"text": [*TEXTS[:-1], None], "label": NUMBERS}),
        r"row 59: the text 'text' is missing",
        "text-null",
    ),
    one_file(
        "x.parquet",
        parquet({"text": pa.array([b"\xff\xfe"] * 60).view(pa.string()), "label": NUMBERS}),
        r"row 0: byte 0xff is not UTF-8",
        "text-not-utf8",
    ),
    one_file(
        "x.parquet",
        parquet({"text": TEXTS, "label": pa.array([b"\xff", b"b"] * 30).view(pa.string())}),
        r"UTF-8",
        "label-not-utf8",
    ),
    *(
        one_file("x.parquet", parquet({"text": TEXTS, "label": labels}), said, f"label-{id}")
        for id, labels, said in (
            ("nan", [0.0, float("nan")] * 30, r"row 1: the label 'label' is nan"),
            ("infinite", [0.0, float("-inf")] * 30, r"row 1: the label 'label' is -inf"),
            ("broken", [0.5, 1.0] * 30, r"row 0: the label 'label' is 0\.5"),
            ("huge-float", [0.0, 1e300] * 30, r"label"),
            ("null", [None, 1] * 30, r"row 0: the label 'label' is missing"),
            ("all-null", [None] * 60, r"label"),
            ("list", [[0], [1]] * 30, r"of the type list"),
            ("struct", [{"a": 0}, {"a": 1}] * 30, r"of the type struct"),
            ("bytes", [b"a", b"b"] * 30, r"of the type binary"),
            ("date", pa.array([1, 2] * 30, pa.date32()), r"of the type date32"),
            ("blank", ["", "a"] * 30, r"label 'label' is missing"),
            ("one", [1] * 60, r"numbers should count|only one class"),
        )
    ),
    # Folders and things that are no files.
    Case(id="an-empty-folder", argv=train_argv("data"), files={"data": None}, said=r"no labelled"),
    folder({"x.csv": None}, r"no labelled documents", "a-folder-called-x.csv"),
    folder({"x.txt": good_csv()}, r"no labelled documents", "a-txt-file"),
    folder({"x.pkl": b"\x80\x04N."}, r"no labelled documents", "a-pickle"),
    folder({"x.csv.gz": b"\x1f\x8b"}, r"no labelled documents", "compressed"),
    folder({"train.csv": os.mkfifo}, r"no labelled documents", "a-fifo"),
    folder({"train.csv": dangling_folder}, r"no labelled documents", "a-dangling-link"),
    folder({"train.csv": link_to("train.csv")}, r"no labelled documents", "a-link-to-itself"),
    folder({"train.csv": link_to("/dev/zero")}, r"no labelled documents", "a-device"),
    folder({".train.csv": good_csv()}, r"no labelled documents", "a-hidden-file"),
    folder({"test.csv": good_csv()}, r"no split 'train'", "only-a-test-file"),
    folder({"train.csv": good_csv(), "test.csv": b""}, r"test\.csv is empty", "an-empty-test-file"),
    folder(
        {"train.csv": good_csv(), "test.csv": "text,label\na pear,fruit\n"},
        r"split test: the class 'tools' has 0 documents",
        "a-class-missing-in-test",
    ),
    folder(
        {"train.csv": good_csv(), "test.csv": good_csv(8, seed="x ") + "a cat,animal\n"},
        r"split train: the class 'animal' has 0 documents",
        "a-class-missing-in-train",
    ),
    folder(
        {"train.csv": good_csv(), "test.csv": good_csv()},
        r"split train: the class 'fruit' has 0 documents",
        "train-equals-test",
    ),
    folder(
        {"train.csv": good_csv(), "test.csv": "said,who\na,b\n"},
        r"test\.csv has the columns 'said', 'who'",
        "other-columns-in-test",
    ),
    folder(
        {"train-1.csv": good_csv(), "train-2.parquet": b"no"}, r"not a Parquet", "one-bad-shard"
    ),
    folder({"train-1.csv": good_csv(), "train-2.csv": b""}, r"train-2\.csv", "one-empty-shard"),
    folder(
        {"train.csv": good_csv(), "classes.txt": "fruit\nfruit\n"},
        r"classes\.txt names a class twice",
        "classes-twice",
    ),
    folder(
        {"train.csv": good_csv(), "classes.txt": b"\xff\xfe"},
        r"classes\.txt, line 1",
        "binary-classes",
    ),
    folder(
        {"train.csv": good_csv(), "classes.txt": "cat\ndog\n"}, r"none of the 2", "other-classes"
    ),
    folder({"train.csv": good_csv(), "classes.txt": "one\n"}, r"only one class", "one-class-line"),
    Case(id="fifo-itself", argv=train_argv("x.csv"), files={"x.csv": os.mkfifo}, said=r"x\.csv"),
    Case(id="folder-named-csv", argv=train_argv("x.csv"), files={"x.csv": None}, said=r"x\.csv"),
    Case(
        id="link-to-nowhere",
        argv=train_argv("x.csv"),
        files={"x.csv": link_to("y.csv")},
        said=r"no file or directory x\.csv",
    ),
    Case(id="a-device-itself", argv=train_argv("/dev/zero"), said=r"/dev/zero"),
    Case(id="dev-null", argv=train_argv("/dev/null"), said=r"/dev/null"),
    Case(id="text-file", argv=train_argv("x.txt"), files={"x.txt": "a\n"}, said=r"x\.txt"),
    Case(id="no-such-path", argv=train_argv("./none"), said=r"no file or directory none"),
    Case(id="no-such-name", argv=train_argv("imbd"), said=r"Did you mean 'imdb'\?"),
    Case(id="empty-name", argv=train_argv(""), said=r"dataset = '': a name is needed"),
    Case(id="blank-name", argv=train_argv("  "), said=r"dataset = '  ': a name is needed"),
    Case(id="long-name", argv=train_argv("d" * 5000), said=r"no path has 5,000 characters"),
    Case(id="long-word", argv=train_argv("d" * 300), said=r"no file or directory d{300}"),
    Case(id="long-path", argv=train_argv("/" + "d" * 500 + "/x.csv"), said=r"d{50}"),
    Case(id="url", argv=train_argv("https://example.org/x.csv"), said=r"x\.csv"),
    Case(id="climbing", argv=train_argv("../../../../etc/passwd"), said=r"passwd"),
    Case(id="hub-id-of-three", argv=train_argv("a/b/c"), said=r"a/b/c"),
    Case(id="control-characters", argv=train_argv("x\x1b[31m\n\ty.csv"), said=r"y\.csv"),
    Case(id="percent-and-braces", argv=train_argv("%s{0}[red]x[/red].csv"), said=r"\[red\]"),
    Case(
        id="bytes-in-the-name",
        argv=train_argv("\udcff\udcfe.csv"),
        said=r"bytes that are not UTF-8",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_bad_data_file_is_refused_in_a_sentence(
    case: Case, tmp_path: Path, run_template: Path
) -> None:
    """Each gives an exit code and a sentence, and changes no file."""
    check_case(case, tmp_path, run_template)


def test_there_are_as_many_as_promised() -> None:
    """No case is written twice."""
    assert len({case.id for case in CASES}) == len(CASES) >= 130
