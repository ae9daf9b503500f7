"""What every source hands over: texts and labels as they stand there, and where each one stands."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from accel_gpt2.data.cache import cached_file, content_key
from accel_gpt2.errors import UserError

# `label` is text whatever it was at the source; `place` is where the document stands, in words.
RAW_SCHEMA = pa.schema([("text", pa.string()), ("label", pa.string()), ("place", pa.string())])

TEXT_NAMES = ("text", "sms", "sentence", "content", "review", "document", "body")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment")

_BATCH_DOCUMENTS = 1024
_BATCH_BYTES = 16 * 2**20

# Above it a float64 has no neighbours one apart, and a label was something else.
_LARGEST_EXACT_FLOAT = 2.0**53


@dataclass(frozen=True, slots=True, kw_only=True)
class RawDocument:
    """One document on its way into a raw split; its three parts are the columns of RAW_SCHEMA."""

    text: str
    label: str
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSplit:
    """One split of a source: a table with columns `text` and `label` (text), memory-mapped.

    `class_names` is what the source itself calls its classes, in label order; empty where it does
    not say. `place(row)` says in words where a row stands.
    """

    table: pa.Table
    place: Callable[[int], str]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldChoice:
    """The names of the text and label columns that a person or a catalog row gives.

    `text` and `label` are "auto" or a name that must be there; the preferred ones are looked for
    first and may be absent.
    """

    text: str = "auto"
    label: str = "auto"
    preferred_text: str | None = None
    preferred_label: str | None = None


def choose_fields(
    columns: Sequence[str], string_columns: Sequence[str], choice: FieldChoice, where: str
) -> tuple[str, str]:
    """The text and the label column of a source with these columns.

    A name that was given; else the catalog's; else a name that such columns usually have; else the
    only string column beside the only other one.

    Raises:
        UserError: when a given name is not there, or nothing is recognisable.

    >>> choose_fields(["id", "Review", "sentiment"], ["Review"], FieldChoice(), "x.csv")
    ('Review', 'sentiment')
    >>> choose_fields(["said", "who"], ["said"], FieldChoice(), "x.parquet")
    ('said', 'who')
    """
    listed = ", ".join(map(repr, columns))
    for key, given in (("text_field", choice.text), ("label_field", choice.label)):
        if given != "auto" and given not in columns:
            raise UserError(
                f"{where} has no column {given!r}; it has {listed}; "
                f"name one of them with --set {key}=..."
            )
    text = _named(choice.text, choice.preferred_text, TEXT_NAMES, columns)
    label = _named(choice.label, choice.preferred_label, LABEL_NAMES, columns)
    if len(columns) == 2 and not (text and label):
        # Of two columns, one that is known or is the only string one decides about both.
        only_string = string_columns[0] if len(string_columns) == 1 else None
        text = text or next((c for c in columns if label and c != label), only_string)
        label = label or next((c for c in columns if text and c != text), None)
    if text is None or label is None or text == label:
        raise UserError(
            f"{where} has the columns {listed}, and which of them hold the text and the label "
            "cannot be told; name them with --set text_field=... --set label_field=..."
        )
    return text, label


def _named(
    given: str, preferred: str | None, usual: Sequence[str], columns: Sequence[str]
) -> str | None:
    if given != "auto":
        return given
    if preferred in columns:
        return preferred
    folded = {column.casefold().strip(): column for column in reversed(columns)}
    return next((folded[name] for name in usual if name in folded), None)


def cached_raw_table(key: str, documents: Callable[[], Iterator[RawDocument]]) -> pa.Table:
    """The documents as a memory-mapped table; they are read only where they are not cached yet."""
    path = cached_file(
        "documents",
        content_key("documents", 1, key),
        ".arrow",
        lambda path: _write_table(path, documents()),
    )
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _write_table(path: Path, documents: Iterator[RawDocument]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, RAW_SCHEMA) as writer:
        batch: list[RawDocument] = []
        num_characters = 0
        for document in documents:
            batch.append(document)
            num_characters += len(document.text)
            if len(batch) == _BATCH_DOCUMENTS or num_characters > _BATCH_BYTES:
                writer.write_batch(_record_batch(batch))
                batch, num_characters = [], 0
        if batch:
            writer.write_batch(_record_batch(batch))


def _record_batch(documents: list[RawDocument]) -> pa.RecordBatch:
    columns = [
        pa.array([getattr(document, name) for document in documents], pa.string())
        for name in RAW_SCHEMA.names
    ]
    return pa.RecordBatch.from_arrays(columns, schema=RAW_SCHEMA)


def labels_as_text(labels: pa.Array, place: Callable[[int], str], column: str) -> pa.Array:
    """Labels of any usable Arrow type as text: 3, 3.0 -> "3"; true -> "True".

    `place(i)` says where the i-th of them stands.

    Raises:
        UserError: for a missing or blank label, a number that is not whole, bytes that are no text,
            or another type.
    """
    if pa.types.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    if labels.null_count:
        raise _missing_label(place, pc.index(labels.is_null(), pa.scalar(True)).as_py(), column)
    kind = labels.type
    if pa.types.is_boolean(kind):
        return pc.if_else(labels, "True", "False").cast(pa.string())
    if pa.types.is_integer(kind):
        return labels.cast(pa.string())
    if pa.types.is_floating(kind):
        whole = pc.and_(
            pc.equal(pc.floor(labels), labels), pc.less_equal(pc.abs(labels), _LARGEST_EXACT_FLOAT)
        )
        row = pc.index(whole, pa.scalar(False)).as_py()
        if row >= 0:
            raise UserError(
                f"{place(row)}: the label {column!r} is {labels[row].as_py()}, "
                "which is not a whole number."
            )
        return labels.cast(pa.int64()).cast(pa.string())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        require_utf8(labels, place)
        labels = pc.utf8_trim_whitespace(labels.cast(pa.string()))
        row = pc.index(labels, pa.scalar("")).as_py()
        if row >= 0:
            raise _missing_label(place, row, column)
        return labels
    raise UserError(
        f"{place(0)}: the label {column!r} is of the type {kind}; whole numbers, text and booleans "
        "can be labels; name another column with --set label_field=..."
    )


def _missing_label(place: Callable[[int], str], row: int, column: str) -> UserError:
    return UserError(f"{place(row)}: the label {column!r} is missing; give it or drop the row.")


def require_utf8(texts: pa.Array, place: Callable[[int], str]) -> None:
    """Raise a UserError naming the first text that is not UTF-8; Parquet does not look."""
    try:
        texts.validate(full=True)
    except pa.ArrowException:
        for index, data in enumerate(texts.cast(pa.large_binary()).to_pylist()):
            try:
                data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{place(index)}: byte 0x{data[error.start]:02x} is not UTF-8."
                ) from None


def require_text_type(kind: pa.DataType, place: str, column: str) -> None:
    """Raise a UserError unless an Arrow column can hold documents."""
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(
            f"{place}: the text {column!r} is of the type {kind}, not text; "
            "name another column with --set text_field=..."
        )


def require_texts(
    texts: pa.Array | pa.ChunkedArray, place: Callable[[int], str], column: str
) -> None:
    """Raise a UserError naming the first text that is missing; an empty one is there."""
    if texts.null_count:
        row = pc.index(texts.is_null(), pa.scalar(True)).as_py()
        raise UserError(f"{place(row)}: the text {column!r} is missing; give it or drop the row.")


def is_whole_number(label: str) -> bool:
    """Whether a label as text is an integer in its usual spelling, of at most 18 digits.

    >>> [is_whole_number(label) for label in ("3", "-1", "03", "3.0", "ham")]
    [True, True, False, False, False]
    """
    return re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", label) is not None
