"""Documents as tokens on disk, memory-mapped: written once, read without copying.

A file holds one Arrow record batch: `tokens` (a list of unsigned integers per document, BOS and EOS
included), `num_bytes` and `truncated`. The key is the texts, the tokenizer and the truncation, and
nothing else; labels and rows come from the documents at hand.
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from accel_gpt2.data.cache import cached_file, content_key
from accel_gpt2.data.progress import document_progress
from accel_gpt2.data.tokenizer import CHARACTERS_PER_TOKEN, TextTokenizer

if TYPE_CHECKING:  # the library takes a second, and predicting needs none of it
    import datasets

_FORMAT_VERSION = 1
_BATCH_DOCUMENTS = 256

# Of numbers; while `datasets` reads selected rows it holds half a kilobyte for each.
_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedDocuments:
    """Documents over one flat array of tokens; all arrays but `tokens` are of shape [documents].

    Document i is `tokens[offsets[i] : offsets[i] + lengths[i]]`. A selection shares the tokens.
    """

    tokens: NDArray[Any]  # uint16, or uint32 for vocabularies above 65,536
    offsets: NDArray[np.int64]  # where each document starts in `tokens`
    lengths: NDArray[np.int32]  # in tokens, BOS and EOS included
    labels: NDArray[np.int64]
    num_bytes: NDArray[np.int64]  # UTF-8 bytes of the text that was kept
    rows: NDArray[np.int64]  # in the source split, from 0
    truncated: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents of this selection, BOS and EOS included."""
        return int(self.lengths.sum(dtype=np.int64))

    def document(self, index: int) -> NDArray[Any]:
        """The tokens of one document, a view."""
        start = int(self.offsets[index])
        return self.tokens[start : start + int(self.lengths[index])]

    def select(self, indices: NDArray[Any]) -> "TokenizedDocuments":
        """These documents, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        return dataclasses.replace(
            self,
            offsets=self.offsets[indices],
            lengths=self.lengths[indices],
            labels=self.labels[indices],
            num_bytes=self.num_bytes[indices],
            rows=self.rows[indices],
            truncated=self.truncated[indices],
        )

    def for_class(self, label: int) -> NDArray[np.int64]:
        """The indices of the documents of one class."""
        return np.flatnonzero(self.labels == label).astype(np.int64, copy=False)


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of documents, read in batches: one by one `datasets` is many times slower."""

    documents: "datasets.Dataset"

    def __iter__(self) -> Iterator[str]:
        texts = self.documents.select_columns(["text"]).with_format("arrow")
        for table in texts.iter(batch_size=_BATCH_DOCUMENTS):
            yield from table["text"].to_pylist()


def tokenize_documents(
    documents: "datasets.Dataset",
    tokenizer: TextTokenizer,
    max_length: int,
    *,
    description: str,
    progress: bool = False,
) -> TokenizedDocuments:
    """Tokenise documents (columns text, label, row), or find them tokenised already.

    Memory stays flat: texts stream through in batches and tokens go straight to the disk.

    Raises:
        UserError: when the cache folder cannot be written or is full.
    """

    def build(path: Path) -> None:
        _write(path, documents, tokenizer, max_length, description, progress)

    key = content_key(
        "tokens", _FORMAT_VERSION, _texts_digest(documents), tokenizer.fingerprint, max_length
    )
    path = cached_file("tokens", key, ".arrow", build)
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    tokens = batch.column("tokens")
    boundaries = tokens.offsets.to_numpy()
    arrow = documents.with_format("arrow")
    return TokenizedDocuments(
        tokens=tokens.values.to_numpy(zero_copy_only=True),
        offsets=boundaries[:-1],
        lengths=np.diff(boundaries).astype(np.int32),
        labels=_integers(arrow, "label"),
        num_bytes=batch.column("num_bytes").to_numpy(),
        rows=_integers(arrow, "row"),
        truncated=batch.column("truncated").to_numpy(zero_copy_only=False),
    )


def _integers(documents: "datasets.Dataset", column: str) -> NDArray[np.int64]:
    parts = [
        table[column].to_numpy()
        for table in documents.select_columns([column]).iter(batch_size=_BATCH_ROWS)
    ]
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64, copy=False)


def _texts_digest(documents: "datasets.Dataset") -> str:
    digest = hashlib.sha256()
    texts = documents.select_columns(["text"]).with_format("arrow")
    for table in texts.iter(batch_size=_BATCH_DOCUMENTS):
        for data in table["text"].cast(pa.large_binary()).to_pylist():
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _write(
    path: Path,
    documents: "datasets.Dataset",
    tokenizer: TextTokenizer,
    max_length: int,
    description: str,
    progress: bool,
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    lengths: list[int] = []
    num_bytes: list[int] = []
    truncated: list[bool] = []
    texts = documents.select_columns(["text"]).with_format("arrow")
    # The spool lies beside the file: the same disk, which is known to have room for it.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.spool") as spool:
        with document_progress(description, len(documents), show=progress) as advance:
            for table in texts.iter(batch_size=_BATCH_DOCUMENTS):
                for document in tokenizer.encode(_heads(table["text"], max_length), max_length):
                    spool.write(document.token_ids.astype(dtype).tobytes())
                    lengths.append(len(document.token_ids))
                    num_bytes.append(document.num_bytes)
                    truncated.append(document.truncated)
                advance(len(table))
        spool.flush()
        _write_arrow(path, Path(spool.name), dtype, lengths, num_bytes, truncated)


def _heads(texts: Any, max_length: int) -> list[str]:
    """Texts cut one character past what the tokenizer looks at: it still sees that it was cut."""
    limit = max_length * CHARACTERS_PER_TOKEN + 1
    heads: list[str] = pc.utf8_slice_codeunits(texts, 0, limit).to_pylist()
    return heads


def _write_arrow(
    path: Path,
    spool: Path,
    dtype: np.dtype[Any],
    lengths: list[int],
    num_bytes: list[int],
    truncated: list[bool],
) -> None:
    # One record batch over the mapped spool: flat tokens for the reader, no copy of them in memory.
    boundaries = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    num_tokens = int(boundaries[-1])
    flat = pa.py_buffer(np.memmap(spool, dtype=dtype, mode="r") if num_tokens else b"")
    values = pa.Array.from_buffers(pa.from_numpy_dtype(dtype), num_tokens, [None, flat])
    batch = pa.RecordBatch.from_arrays(
        [
            pa.LargeListArray.from_arrays(pa.array(boundaries), values),
            pa.array(num_bytes, pa.int64()),
            pa.array(truncated, pa.bool_()),
        ],
        names=["tokens", "num_bytes", "truncated"],
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
