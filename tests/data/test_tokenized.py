"""Tokenised documents: on disk, mapped, found again, and never wrong."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from accel_gpt2.data import tokenized
from accel_gpt2.data.tokenized import Texts, TokenizedDocuments, tokenize_documents
from accel_gpt2.data.tokenizer import TextTokenizer, load_gpt2_tokenizer

GPT2 = load_gpt2_tokenizer()
TEXTS = ["Hello world", "", "naïve 日本 😀", "<|endoftext|>", "a longer text " * 9, "x" * 40_000]


def _documents(texts: list[str] | None = None) -> datasets.Dataset:
    texts = TEXTS if texts is None else texts
    columns = {"text": texts, "label": [i % 3 for i in range(len(texts))]}
    return datasets.Dataset.from_dict({**columns, "row": list(range(10, 10 + len(texts)))})


def _tokenize(
    documents: datasets.Dataset,
    tokenizer: TextTokenizer = GPT2,
    max_length: int = 16,
    **kwargs: Any,
) -> TokenizedDocuments:
    return tokenize_documents(documents, tokenizer, max_length, description="Tokenising", **kwargs)


class _Unusable:
    """What a second start gets for a tokenizer's model: any use of it fails."""

    def encode_batch(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("tokenised again")


_UNUSABLE = replace(GPT2, _backend=_Unusable())


def test_documents_are_what_the_tokenizer_says() -> None:
    """Tokens, lengths, bytes and truncation agree with encoding each text alone."""
    documents = _tokenize(_documents())
    assert len(documents) == len(TEXTS)
    for index, text in enumerate(TEXTS):
        (alone,) = GPT2.encode([text], 16)
        assert documents.document(index).tolist() == alone.token_ids.tolist()
        assert documents.lengths[index] == len(alone.token_ids)
        assert documents.num_bytes[index] == alone.num_bytes
        assert documents.truncated[index] == alone.truncated
    assert documents.truncated.tolist() == [False, False, False, False, True, True]
    assert documents.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert documents.rows.tolist() == list(range(10, 16))
    assert documents.num_tokens == documents.lengths.sum() == len(documents.tokens)
    types = {name: getattr(documents, name).dtype.name for name in documents.__slots__}
    assert types == {
        "tokens": "uint16",
        "offsets": "int64",
        "lengths": "int32",
        "labels": "int64",
        "num_bytes": "int64",
        "rows": "int64",
        "truncated": "bool",
    }


def test_texts_are_read_again_and_in_order() -> None:
    """Also those of a selection: a tokenizer reads them once for its key and once to train."""
    documents = _documents([str(number) for number in range(1000)])
    texts = Texts(documents.select(range(999, 400, -1)))
    expected = [str(number) for number in range(999, 400, -1)]
    assert [list(texts), list(texts)] == [expected, expected]


def test_selections_share_the_tokens() -> None:
    """Selecting by index or class copies no token and keeps every column in step."""
    documents = _tokenize(_documents())
    chosen = documents.select(np.array([4, 0]))
    assert chosen.tokens is documents.tokens
    assert chosen.rows.tolist() == [14, 10]
    assert chosen.document(1).tolist() == documents.document(0).tolist()
    assert np.shares_memory(chosen.document(0), documents.tokens)
    assert documents.for_class(2).tolist() == [2, 5]
    assert documents.select(documents.for_class(2)).labels.tolist() == [2, 2]
    nested = documents.select(np.array([1, 2, 3])).select(np.array([2]))
    assert nested.rows.tolist() == [13]


def test_a_second_start_does_not_tokenise_again() -> None:
    """The same texts, tokenizer and length are read from disk; other labels do not matter."""
    first = _tokenize(_documents())
    second = _tokenize(_documents(), _UNUSABLE)
    assert np.array_equal(first.tokens, second.tokens)
    relabelled = _documents().remove_columns("label").add_column("label", [2] * len(TEXTS))
    assert _tokenize(relabelled, _UNUSABLE).labels.tolist() == [2] * len(TEXTS)


def test_another_text_tokenizer_or_length_is_tokenised() -> None:
    """Each part of the key counts."""
    _tokenize(_documents())
    for documents, tokenizer, max_length in (
        (_documents([*TEXTS[:-1], "another"]), _UNUSABLE, 16),
        (_documents(TEXTS[::-1]), _UNUSABLE, 16),
        (_documents(), replace(_UNUSABLE, fingerprint="another"), 16),
        (_documents(), _UNUSABLE, 17),
    ):
        with pytest.raises(AssertionError, match="tokenised again"):
            _tokenize(documents, tokenizer, max_length)


def test_splits_that_only_join_alike_are_different() -> None:
    """["ab", "c"] and ["a", "bc"] are different texts to the cache."""
    _tokenize(_documents(["ab", "c"]))
    with pytest.raises(AssertionError, match="tokenised again"):
        _tokenize(_documents(["a", "bc"]), _UNUSABLE)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "junk"])
def test_a_damaged_cache_is_made_again(cache: Path, damage: str) -> None:
    """A shortened, altered, emptied or overwritten file is noticed, and the tokens are right."""
    first = _tokenize(_documents()).tokens.copy()
    (path,) = (cache / "tokens").glob("*.arrow")
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes(
        {"cut": content[:-9], "flip": flipped, "empty": b"", "junk": b"x" * 99}[damage]
    )
    assert np.array_equal(_tokenize(_documents()).tokens, first)
    assert [file.read_bytes() for file in (cache / "tokens").iterdir()] == [content]


def test_the_tokens_are_mapped_not_read(cache: Path) -> None:
    """They are a read-only view of the cached file in this process's address space."""
    tokens = _tokenize(_documents()).tokens
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable
    (path,) = (cache / "tokens").glob("*.arrow")
    address = tokens.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        if path.name in line:
            start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
            if start <= address < end:
                return
    pytest.fail(f"the tokens are not inside a mapping of {path.name}")


def test_large_vocabularies_get_wide_tokens() -> None:
    """Above 65,536 entries a token takes four bytes."""
    wide = _tokenize(_documents(), replace(GPT2, vocab_size=2**16 + 1, fingerprint="wide"))
    assert wide.tokens.dtype == np.uint32
    assert wide.document(0).tolist() == _tokenize(_documents()).document(0).tolist()


def test_no_documents_and_selected_documents() -> None:
    """An empty data set is no error, and a selection is tokenised as it stands."""
    assert len(_tokenize(_documents().select([]))) == 0
    picked = _tokenize(_documents().select([4, 0]))
    assert picked.rows.tolist() == [14, 10]
    assert picked.document(1).tolist() == [50256, 15496, 995, 50256]


def test_more_documents_than_a_batch() -> None:
    """Nothing is lost or doubled where one batch ends and the next begins."""
    count = tokenized._BATCH_DOCUMENTS * 2 + 1
    documents = _tokenize(_documents([f"text {i}" for i in range(count)]))
    texts = [GPT2.decode(documents.document(i)) for i in range(count)]
    assert texts == [f"text {i}" for i in range(count)]


def test_plain_lines_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """With progress there is a line at the start and one at the end on stderr; without, nothing."""
    _tokenize(_documents(["one"]))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    _tokenize(_documents(["one", "two"]), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    pattern = (
        r"Tokenising: 2 documents \.\.\.\nTokenising: 2 documents in [\d.]+ s \([\d,]+ a second\)\n"
    )
    assert re.fullmatch(pattern, err)
