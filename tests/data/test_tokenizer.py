"""Tokenizers: GPT-2's own to the byte, trained ones that repeat, and text that stays text."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from huggingface_hub import HfApi
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from accel_gpt2.data import hub as data_hub
from accel_gpt2.data import tokenizer as tokenizer_module
from accel_gpt2.data.tokenizer import (
    GPT2_VOCABULARY,
    TextTokenizer,
    load_gpt2_tokenizer,
    load_saved_tokenizer,
    load_tokenizer,
)
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe

GPT2 = load_gpt2_tokenizer()

TRICKY = [
    "Hello world",
    "",
    " ",
    "  two  spaces \n\n\ttabs\r\n and the end   ",
    "don't they'll I'VE we're",
    "naïve café — “quotes” … 日本語 العربية 😀👩‍👩‍👧 \u0301\u200d",
    "1234567890 3.14159 x86_64 a_b-c/d\\e",
    "\x00\x01\x7f\ufeff\U0010ffff",
    "<|endoftext|>",
    "a<|endoftext|><|endoftext|>b",
    "<br /><br />",
]


@pytest.fixture(scope="module")
def reference() -> tokenizers.ByteLevelBPETokenizer:
    """The same vocabulary in the tokenizers library's own byte-level BPE."""
    return tokenizers.ByteLevelBPETokenizer(
        str(GPT2_VOCABULARY / "vocab.json"), str(GPT2_VOCABULARY / "merges.txt")
    )


def test_the_vocabulary_is_byte_exact() -> None:
    """The shipped files have the sha256 that tiktoken knows for OpenAI's."""
    digests = {
        name: hashlib.sha256((GPT2_VOCABULARY / name).read_bytes()).hexdigest()
        for name in ("vocab.json", "merges.txt")
    }
    assert digests == {
        "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    }


def test_gpt2_encodes_as_gpt2() -> None:
    """BOS, the two known tokens of "Hello world", EOS."""
    (document,) = GPT2.encode(["Hello world"], 16)
    assert document.token_ids.tolist() == [50256, 15496, 995, 50256]
    assert document.token_ids.dtype == np.int64
    assert (document.num_bytes, document.truncated) == (11, False)
    assert (GPT2.vocab_size, GPT2.bos_token_id, GPT2.eos_token_id) == (50257, 50256, 50256)


def test_gpt2_equals_an_independent_byte_level_bpe(
    reference: tokenizers.ByteLevelBPETokenizer,
) -> None:
    """Tricky texts, a literal <|endoftext|> among them, get the ids of the plain BPE."""
    for text, document in zip(TRICKY, GPT2.encode(TRICKY, 1024), strict=True):
        assert document.token_ids[1:-1].tolist() == reference.encode(text).ids, text
        assert GPT2.decode(document.token_ids) == text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.integers(3, 12))
@settings(max_examples=100, deadline=None)
def test_truncation_keeps_a_prefix_and_counts_its_bytes(text: str, max_length: int) -> None:
    """The tokens are the first of the whole text's, and stand for `num_bytes` of it."""
    whole, cut = GPT2.encode([text], 1024)[0], GPT2.encode([text], max_length)[0]
    kept = whole.token_ids[1:-1][: max_length - 2]
    assert cut.token_ids.tolist() == [50256, *kept.tolist(), 50256]
    assert cut.truncated == (len(whole.token_ids) > max_length)
    assert whole.num_bytes == len(text.encode())
    # Byte-level tokens are bytes; a character cut in its middle counts whole.
    exact = sum(len(GPT2._backend.id_to_token(int(token))) for token in kept)
    assert exact <= cut.num_bytes <= exact + 3
    text.encode()[: cut.num_bytes].decode()  # raises in the middle of a character


@pytest.mark.parametrize("text", ["a" * 10_000_000, "word " * 2_000_000, "\n" * 10_000_000])
def test_ten_megabytes_cost_their_beginning(text: str) -> None:
    """A huge document is truncated in well under a second, and says so."""
    started = time.perf_counter()
    (document,) = GPT2.encode([text], 256)
    assert time.perf_counter() - started < 2
    assert document.truncated
    assert len(document.token_ids) <= 256


def test_a_cut_before_tokenising_counts_as_truncation() -> None:
    """Tokens of 512 letters leave room in the limit, yet the rest of the text was not looked at."""
    tokenizer = _trained(["a" * 1024] * 3, 266)
    (document,) = tokenizer.encode(["a" * 100_000], 256)
    assert len(document.token_ids) < 256
    assert (document.num_bytes, document.truncated) == (256 * 64, True)


def test_training_twice_gives_equal_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainings on the same texts, neither from the cache, save the same bytes."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh "), 6)) for _ in range(500)]
    texts = [" ".join(rng.choice(words, 30)) for _ in range(400)]
    saved = []
    for name in ("one", "two"):
        monkeypatch.setenv("ACCEL_GPT2_CACHE", str(tmp_path / name / "cache"))
        _trained(texts, 700).save(tmp_path / name)
        files = sorted(path for path in (tmp_path / name).iterdir() if path.is_file())
        saved.append({path.name: path.read_bytes() for path in files})
    assert saved[0] == saved[1]
    assert "tokenizer.json" in saved[0]


def _trained(texts: Any, vocab_size: int) -> TextTokenizer:
    recipe = TrainRecipe(init="scratch", tokenizer="train", tokenizer_vocab_size=vocab_size)
    return load_tokenizer(recipe, texts)


def test_a_trained_tokenizer_covers_any_text() -> None:
    """Its size counts <|endoftext|> in, and text that it never saw comes back from its tokens."""
    tokenizer = _trained(["the cat sat on the mat and the dog sat on the cat"] * 20, 270)
    assert tokenizer.vocab_size == 270
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    for text, document in zip(TRICKY, tokenizer.encode(TRICKY, 1024), strict=True):
        assert 0 not in document.token_ids[1:-1]
        assert tokenizer.decode(document.token_ids) == text


def test_training_is_cached_by_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts, also from a generator, are not trained on twice; other texts or sizes are."""
    texts = ["some text", "more text"] * 5
    first = _trained(texts, 300)
    monkeypatch.setattr(
        tokenizer_module, "_byte_level_bpe", lambda *_: pytest.fail("trained again")
    )
    assert _trained((text for text in texts), 300).fingerprint == first.fingerprint
    for other_texts, size in ((texts, 301), (texts[1:], 300)):
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            _trained(other_texts, size)


@pytest.mark.parametrize("which", ["gpt2", "trained", "llama"])
def test_saved_tokenizers_come_back(tmp_path: Path, which: str) -> None:
    """What `save` wrote encodes alike through us, and is read by AutoTokenizer."""
    tokenizer = {
        "gpt2": load_gpt2_tokenizer,
        "trained": lambda: _trained(["some text to train on"] * 5, 270),
        "llama": lambda: load_saved_tokenizer(_llama_style(tmp_path / "llama")),
    }[which]()
    tokenizer.save(tmp_path / "saved")
    again = load_saved_tokenizer(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.bos_token_id, again.eos_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    auto = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = auto("some text", add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(["some text"], 64)[0].token_ids[1:-1].tolist() == ids
    assert auto.eos_token_id == tokenizer.eos_token_id


def _llama_style(folder: Path, *, eos: str | None = "</s>") -> Path:
    """A BPE like Llama's: pieces with a low line, <s> and </s>, and a post-processor for <s>."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat </s> <s> some text"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


def test_a_llama_style_tokenizer(tmp_path: Path) -> None:
    """One BOS, one EOS, special tokens in the text spelled out, stored truncation ignored."""
    tokenizer = load_saved_tokenizer(_llama_style(tmp_path / "llama"))
    texts = ["the cat sat on the mat", "the </s> cat <s>"]
    for text, document in zip(texts, tokenizer.encode(texts, 64), strict=True):
        ids = document.token_ids.tolist()
        assert (ids[0], ids[-1]) == (1, 2)
        assert not {1, 2} & set(ids[1:-1])
        assert tokenizer.decode(ids).split() == text.split()
        assert not document.truncated


def test_a_tokenizer_without_bos_starts_with_eos(tmp_path: Path) -> None:
    """GPT-NeoX and others have one special token for both ends."""
    folder = _llama_style(tmp_path / "x")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer = load_saved_tokenizer(folder)
    assert tokenizer.encode(["the cat"], 16)[0].token_ids.tolist()[:1] == [2]


def test_which_tokenizer_a_recipe_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catalog sizes and their hub ids take the package's vocabulary; a directory takes its own,
    also by its name under ACCEL_GPT2_MODELS."""
    monkeypatch.setattr(tokenizer_module, "ask_hub", lambda *_: pytest.fail("asked the hub"))
    own = str(_llama_style(tmp_path / "own"))
    (tmp_path / "own" / "config.json").write_text("{}")
    for model in ("gpt2", "gpt2-xl", "distilgpt2", "openai-community/gpt2-large"):
        assert load_tokenizer(TrainRecipe(model=model), None).vocab_size == 50257
    assert load_tokenizer(TrainRecipe(model=own), None).eos_token_id == 2
    assert load_tokenizer(TrainRecipe(tokenizer=own), None).eos_token_id == 2
    monkeypatch.setenv("ACCEL_GPT2_MODELS", str(tmp_path))
    assert load_tokenizer(TrainRecipe(model="own"), None).eos_token_id == 2


def test_tokenizers_that_cannot_be_had(tmp_path: Path, hub: Any, monkeypatch: Any) -> None:
    """A directory without one, one without EOS, damaged files and unknown hub ids are explained."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"bare holds no tokenizer .*--set tokenizer=train"):
        load_tokenizer(TrainRecipe(model=str(bare)), None)
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        load_saved_tokenizer(_llama_style(tmp_path / "endless", eos=None))
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"bare cannot be loaded .*--set tokenizer=DIRECTORY"):
        load_saved_tokenizer(bare)
    with pytest.raises(UserError, match="needs the training texts"):
        load_tokenizer(TrainRecipe(init="scratch", tokenizer="train"), None)

    addresses = {
        hub("me/pets", {}): r"neither a directory nor a model on the Hugging Face hub",
        "http://127.0.0.1:9": r"hub does not answer; fetch it .*`hf download me/model`",
    }
    for address, message in addresses.items():
        monkeypatch.setattr(data_hub, "HfApi", lambda address=address: HfApi(endpoint=address))
        with pytest.raises(UserError, match=message):
            load_tokenizer(TrainRecipe(model="me/model"), None)


def test_a_model_that_spells_text_as_eos_is_refused(tmp_path: Path) -> None:
    """A unigram tokenizer takes </s> in a text for its EOS piece whatever it is told: an error."""
    backend = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("<", -5.0)], unk_id=0)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path)
    tokenizer = load_saved_tokenizer(tmp_path)
    assert tokenizer.encode(["aa"], 8)[0].token_ids.tolist() == [1, 2, 2, 1]
    with pytest.raises(UserError, match=r"spelled out in a text as the special token .*'a</s>a'"):
        tokenizer.encode(["a</s>a"], 8)
