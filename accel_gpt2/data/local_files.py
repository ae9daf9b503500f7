"""Labelled documents in local files: CSV, TSV, JSON lines and Parquet, alone or in a directory.

Files are read as a stream. What is wrong in one ends in a sentence with the file and the line (of
text files, from 1) or the row (of Parquet, from 0).
"""

import csv
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from accel_gpt2.catalog.datasets import find_dataset
from accel_gpt2.data.raw import (
    FieldChoice,
    RawDocument,
    RawSplit,
    cached_raw_table,
    choose_fields,
    labels_as_text,
    require_text_type,
    require_texts,
    require_utf8,
)
from accel_gpt2.errors import UserError

Format = Literal["csv", "tsv", "jsonl", "parquet"]

_FORMATS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
DATA_VARIABLE = "ACCEL_GPT2_DATA"
SUFFIXES = ("CSV", "TSV", "JSONL", "Parquet")

# What the name of a file or a subdirectory may begin with, and the split that it then belongs to.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "unsupervised": "unsupervised",
}

_MAX_FIELD_CHARACTERS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFiles:
    """The data files of one local data set, sorted by name.

    `class_names` are the lines of a classes.txt beside the files, in label order, if there is one.
    """

    path: Path
    data_files: tuple[Path, ...]
    class_names: tuple[str, ...]

    @property
    def is_one_file(self) -> bool:
        """Whether a single file was named, which has no splits."""
        return self.path.is_file()

    def files(self, split: str) -> tuple[Path, ...]:
        """The files of a split; none if there is no such split.

        A split is told by how the name of a file or of its subdirectory begins: `test.csv`,
        `train_subset.parquet`, `train-00000-of-00001.parquet`, `train/part-1.jsonl`. When none is
        called train, the files that carry the name of no split are the training split.
        """
        if self.is_one_file:
            return self.data_files if split == "train" else ()
        wanted = _SPLIT_WORDS.get(split, split)
        named = tuple(file for file in self.data_files if self._split_of(file) == wanted)
        if named:
            return named
        if wanted == "train":
            return tuple(file for file in self.data_files if self._split_of(file) is None)
        return tuple(
            file for file in self.data_files if re.match(rf"{re.escape(split)}([-_.]|$)", file.stem)
        )

    def unread_files(self, *splits: str) -> tuple[Path, ...]:
        """The data files that belong to none of these splits."""
        read = {file for split in splits for file in self.files(split)}
        return tuple(file for file in self.data_files if file not in read)

    def _split_of(self, file: Path) -> str | None:
        names = [file.stem] if file.parent == self.path else [file.stem, file.parent.name]
        for name in names:
            word = re.match(r"[a-z]+", name.lower())
            if word and word.group() in _SPLIT_WORDS:
                return _SPLIT_WORDS[word.group()]
        return None


def find_dataset_files(dataset: str) -> LocalFiles | None:
    """The files of a data set: under the folder that ACCEL_GPT2_DATA names, else at its path.

    None when there are none, and for a data set that is made on the machine.

    Raises:
        UserError: when ACCEL_GPT2_DATA names no directory.
    """
    row = find_dataset(dataset)
    if row is not None and row.hub_id is None:
        return None
    if folder := os.environ.get(DATA_VARIABLE):
        root = Path(folder).expanduser()
        if not os.path.isdir(root):
            raise UserError(
                f"{DATA_VARIABLE} names {root}, which is no directory; correct or unset it."
            )
        for name in dict.fromkeys((dataset, dataset if row is None else row.name)):
            same_stem = glob.glob(f"{glob.escape(str(root / name))}.*")
            for candidate in (root / name, *map(Path, sorted(same_stem))):
                if (local := find_local_files(candidate)) is not None:
                    return local
    return find_local_files(Path(dataset).expanduser())


def find_local_files(path: Path) -> LocalFiles | None:
    """The data files at a path; None when nothing there can be read as labelled documents.

    A directory is looked at together with its direct subdirectories.
    """
    # os.path, because to pathlib a name that is too long is an error and not an answer.
    if os.path.isfile(path) and path.suffix.lower() in _FORMATS:
        return LocalFiles(path=path, data_files=(path,), class_names=_read_class_names(path.parent))
    if not os.path.isdir(path):
        return None
    data_files = tuple(
        file
        for pattern in ("*", "*/*")
        for file in sorted(path.glob(pattern))
        if file.suffix.lower() in _FORMATS
        and os.path.isfile(file)
        and not file.name.startswith((".", "_"))
    )
    if not data_files:
        return None
    return LocalFiles(path=path, data_files=data_files, class_names=_read_class_names(path))


def _read_class_names(directory: Path) -> tuple[str, ...]:
    file = directory / "classes.txt"
    if not file.is_file():
        return ()
    names = tuple(line.strip() for _, line in _lines(file) if line.strip())
    if len(set(names)) < len(names):
        raise UserError(f"{file} names a class twice; give each class one line of its own.")
    return names


def read_split(local: LocalFiles, split: str, choice: FieldChoice) -> RawSplit:
    """Read one split of local files.

    Raises:
        UserError: for whatever is wrong in a file, naming it and the line or row.
    """
    files = local.files(split)
    table = cached_raw_table(
        _content(local, files, choice), lambda: _documents(local, files, choice)
    )
    if len(table) == 0:
        raise UserError(f"{files[0]} holds no documents.")
    places = table["place"]
    return RawSplit(
        table=table.select(["text", "label"]),
        place=lambda row: f"{_folder(local)}{places[row].as_py()}",
        class_names=local.class_names,
    )


def check_fields(local: LocalFiles, split: str, choice: FieldChoice) -> None:
    """Raise a UserError when the first file of a split has not got the fields; reads its head."""
    _fields(local.files(split)[0], choice)


def _content(local: LocalFiles, files: Sequence[Path], choice: FieldChoice) -> str:
    """What the files hold and how they are read, without where they are."""
    parts: list[object] = [choice.text, choice.label, choice.preferred_text, choice.preferred_label]
    for file in files:
        try:
            with file.open("rb") as stream:
                parts.append(
                    [_name(local, file), hashlib.file_digest(stream, "sha256").hexdigest()]
                )
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    return json.dumps(parts)


def _folder(local: LocalFiles) -> str:
    folder = local.path if local.path.is_dir() else local.path.parent
    return f"{folder}/"


def _name(local: LocalFiles, file: Path) -> str:
    return file.relative_to(_folder(local)).as_posix()


def _documents(
    local: LocalFiles, files: Sequence[Path], choice: FieldChoice
) -> Iterator[RawDocument]:
    for file in files:
        text_field, label_field = _fields(file, choice)
        read = _read_parquet if _format(file) == "parquet" else _read_text_file
        yield from read(file, _name(local, file), text_field, label_field)


def _format(file: Path) -> Format:
    return _FORMATS[file.suffix.lower()]


def _fields(file: Path, choice: FieldChoice) -> tuple[str, str]:
    if _format(file) == "parquet":
        with _open_parquet(file) as parquet:
            schema = parquet.schema_arrow
        strings = [
            field.name
            for field in schema
            if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
        ]
        return choose_fields(schema.names, strings, choice, str(file))
    if _format(file) == "jsonl":
        first = next(_json_records(file), None)
        if first is None:
            raise UserError(f"{file} holds no documents.")
        record = first[1]
        strings = [name for name, value in record.items() if isinstance(value, str)]
        return choose_fields(list(record), strings, choice, str(file))
    header = next(_csv_records(file), None)
    if header is None or not header[1]:
        raise UserError(f"{file} is empty; its first line should name the columns.")
    columns = header[1]
    if len(set(columns)) < len(columns):
        raise UserError(f"{file}, line 1: two columns have the same name; rename one of them.")
    # In a CSV every column is text, so with two unknown ones nothing tells which is the label.
    return choose_fields(columns, columns, choice, str(file))


def _read_text_file(
    file: Path, name: str, text_field: str, label_field: str
) -> Iterator[RawDocument]:
    rows = _json_rows if _format(file) == "jsonl" else _csv_rows
    for line, text, label in rows(file, text_field, label_field):
        where = f"{file}, line {line}"
        if not isinstance(text, str):
            raise UserError(f"{where}: the text {text_field!r} is {_described(text)}, not text.")
        _require_characters(text, where, "text")
        yield RawDocument(
            text=text, label=_label_as_text(label, where, label_field), place=f"{name}, line {line}"
        )


def _csv_rows(file: Path, text_field: str, label_field: str) -> Iterator[tuple[int, Any, Any]]:
    records = _csv_records(file)
    _, columns = next(records)
    text_index, label_index = columns.index(text_field), columns.index(label_field)
    for line, record in records:
        if not record:  # a blank line
            continue
        if len(record) != len(columns):
            raise UserError(
                f"{file}, line {line}: {len(record)} fields where the header has {len(columns)}; "
                "a field that holds the separator or a quote must be quoted."
            )
        yield line, record[text_index], record[label_index].strip() or None


def _csv_records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Records with the line on which each begins."""
    csv.field_size_limit(
        _MAX_FIELD_CHARACTERS
    )  # the default of 128 KiB is less than some documents
    separator = "\t" if _format(file) == "tsv" else ","
    # Strict, because otherwise one stray quote swallows the rest of the file without a word.
    reader = csv.reader((line for _, line in _lines(file)), delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{file}, line {line}: {error}; a quote inside a quoted field must be doubled."
            ) from None
        yield line, record


def _json_rows(file: Path, text_field: str, label_field: str) -> Iterator[tuple[int, Any, Any]]:
    for line, record in _json_records(file):
        for field in (text_field, label_field):
            if field not in record:
                raise UserError(
                    f"{file}, line {line}: there is no {field!r}; it has "
                    f"{', '.join(map(repr, record)) or 'no fields'}."
                )
        yield line, record[text_field], record[label_field]


def _json_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in _lines(file):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}, line {line}: this is not JSON ({error.msg} at column {error.colno}); "
                "each line should hold one object."
            ) from None
        except (RecursionError, ValueError):
            raise UserError(
                f"{file}, line {line}: this JSON is nested too deep, or a number in it has "
                "thousands of digits; each line should hold one plain object."
            ) from None
        if not isinstance(record, dict):
            raise UserError(
                f"{file}, line {line}: this is {_described(record)}; each line should hold one "
                'object, as in {"text": "...", "label": 0}.'
            )
        yield line, record


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines with their number from 1, decoded one by one so that a wrong byte has a line."""
    try:
        with file.open("rb") as stream:
            for number, data in enumerate(stream, start=1):
                try:
                    # A byte-order mark, which spreadsheets write, is not part of the first name.
                    yield number, data.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{file}, line {number}: byte 0x{data[error.start]:02x} is not UTF-8; "
                        "convert the file, for instance with `iconv -t UTF-8`."
                    ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None


def _label_as_text(label: Any, where: str, field: str) -> str:
    if label is None:
        raise UserError(f"{where}: the label {field!r} is missing; give it or drop the row.")
    if isinstance(label, str):
        _require_characters(label, where, "label")
        if not label.strip():
            raise UserError(f"{where}: the label {field!r} is missing; give it or drop the row.")
    if isinstance(label, bool | int | str):
        return str(label).strip()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    raise UserError(
        f"{where}: the label {field!r} is {_described(label)}; it should be a whole number, text "
        "or a boolean."
    )


def _require_characters(text: str, where: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: the {what} holds half of a surrogate pair (an escape such as \\ud83d "
            "without its partner), which is no character."
        ) from None


def _described(value: Any) -> str:
    names = {dict: "an object", list: "an array", type(None): "null"}
    return names.get(type(value), f"{value!r}"[:60])


def _open_parquet(file: Path) -> Any:
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{file} is not a Parquet file that can be read: {_reason(error)}"
        ) from None


def _read_parquet(
    file: Path, name: str, text_field: str, label_field: str
) -> Iterator[RawDocument]:
    with _open_parquet(file) as parquet:
        schema = parquet.schema_arrow
        require_text_type(schema.field(text_field).type, str(file), text_field)
        start = 0
        batches = parquet.iter_batches(batch_size=1024, columns=[text_field, label_field])
        while True:
            try:
                batch = next(batches, None)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{file}, after row {start}: {_reason(error)}") from None
            if batch is None:
                return
            place = _row_namer(file, start)
            texts = batch.column(text_field)
            require_texts(texts, place, text_field)
            require_utf8(texts, place)
            labels = labels_as_text(batch.column(label_field), place, label_field)
            pairs = zip(texts.to_pylist(), labels.to_pylist(), strict=True)
            for row, (text, label) in enumerate(pairs, start=start):
                yield RawDocument(text=text, label=label, place=f"{name}, row {row}")
            start += len(batch)


def _row_namer(file: Path, start: int) -> Callable[[int], str]:
    return lambda index: f"{file}, row {start + index}"


def _reason(error: BaseException) -> str:
    # Some libraries put the name of an exception of theirs before what they say.
    text = re.sub(r"\b\w+Exception: ", "", " ".join(str(error).split()))
    return text[:200].rstrip(".") + "."
