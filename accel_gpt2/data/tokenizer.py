"""Text to tokens: which tokenizer a recipe means, and how a document becomes BOS, tokens, EOS."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.data.cache import cached_file, content_key
from accel_gpt2.data.hub import HubAnswer, ask_hub, why_unreachable
from accel_gpt2.data.progress import document_progress
from accel_gpt2.data.quiet import quiet_transformers
from accel_gpt2.data.weights import local_model, weights_location
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe

GPT2_VOCABULARY = Path(__file__).parent / "gpt2_vocabulary"
END_OF_TEXT = "<|endoftext|>"
PAD, MASK = "<pad>", "<mask>"  # of encoders

# No more of a document's beginning is looked at than this many characters per token that can be
# kept, so that a document of 10 MB costs what its first tokens cost. Prose has about four.
CHARACTERS_PER_TOKEN = 64

# The tokenizers library encodes a batch on all cores. Saying so also says that it is meant, which
# keeps it from warning in every process that is forked later on.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedDocument:
    """One document as a model sees it.

    `token_ids` are BOS, tokens, EOS (int64). `num_bytes` counts the UTF-8 bytes of the text that
    the tokens stand for: all of it unless `truncated` (a character cut in its middle counts whole).
    """

    token_ids: NDArray[np.int64]
    num_bytes: int
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokenizer:
    """A fast tokenizer that adds one BOS and one EOS itself and reads all text as text.

    A literal `<|endoftext|>` (or any other special token) in a document is spelled out in ordinary
    tokens: it never becomes the special token. `name` says where the tokenizer came from;
    `fingerprint` is equal exactly for tokenizers that encode alike. `mask_token_id` and
    `pad_token_id` are None where it has no such token; documents never hold them.
    """

    name: str
    bos_token_id: int
    eos_token_id: int
    vocab_size: int
    fingerprint: str
    mask_token_id: int | None
    pad_token_id: int | None
    _tokenizer: Any = field(repr=False)  # transformers.PreTrainedTokenizerFast
    _backend: Any = field(repr=False)  # its tokenizers.Tokenizer

    def encode(self, texts: list[str], max_length: int) -> list[EncodedDocument]:
        """Encode documents, keeping at most `max_length` tokens of each, BOS and EOS included.

        Raises:
            UserError: when the tokenizer's model itself spells text as BOS or EOS.
        """
        assert max_length >= 3, "BOS, one token, EOS"
        num_characters = max_length * CHARACTERS_PER_TOKEN
        heads = [text[:num_characters] for text in texts]
        encodings = self._backend.encode_batch(heads, add_special_tokens=False)
        return [
            self._encoded(text, head, encoding, max_length - 2)
            for text, head, encoding in zip(texts, heads, encodings, strict=True)
        ]

    def _encoded(self, text: str, head: str, encoding: Any, max_tokens: int) -> EncodedDocument:
        ids = encoding.ids
        if self.bos_token_id in ids or self.eos_token_id in ids:
            raise UserError(
                f"The tokenizer {self.name} encodes a special token that is spelled out in a text "
                f"as the special token itself (in {text[:60]!r}...); choose another tokenizer, for "
                "instance --set tokenizer=train with --init scratch."
            )
        kept, kept_text = ids, head
        if len(ids) > max_tokens:
            kept = ids[:max_tokens]
            kept_text = head[: encoding.token_to_chars(max_tokens - 1)[1]]
        return EncodedDocument(
            token_ids=np.array([self.bos_token_id, *kept, self.eos_token_id], dtype=np.int64),
            num_bytes=len(kept_text.encode("utf-8")),
            truncated=len(ids) > max_tokens or len(text) > len(head),
        )

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of tokens, special tokens left out."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        """Write the tokenizer so that `AutoTokenizer.from_pretrained(directory)` reads it back."""
        self._tokenizer.save_pretrained(directory)


def load_tokenizer(
    recipe: TrainRecipe, train_texts: Iterable[str] | None, *, progress: bool = False
) -> TextTokenizer:
    """The tokenizer that a recipe means; `train_texts` are read only by `tokenizer = "train"`.

    `auto` is the model's own: for the GPT-2 sizes of the catalog the vocabulary that ships with
    this package, else what stands in the model's directory or hub repository (`weights_location`).

    Raises:
        UserError: when the tokenizer cannot be had, is not a fast one, or has no EOS.
    """
    if recipe.tokenizer == "train":
        if train_texts is None:
            raise UserError("tokenizer = 'train' needs the training texts, and there are none.")
        row = MODELS.get(recipe.model)
        encoder = recipe.objective == "masked_lm" or (
            row is not None and row.model_type == "roberta"
        )
        return _train_tokenizer(
            train_texts,
            recipe.tokenizer_vocab_size,
            special_tokens=[END_OF_TEXT, PAD, MASK] if encoder else [END_OF_TEXT],
            progress=progress,
        )
    source = _source(recipe)
    return load_gpt2_tokenizer() if source is None else _from_pretrained(source)


def check_tokenizer_available(recipe: TrainRecipe) -> None:
    """Raise what `load_tokenizer` would for a tokenizer that is nowhere, without reading it."""
    source = None if recipe.tokenizer == "train" else _source(recipe)
    if source is not None:
        _find(source)


def _source(recipe: TrainRecipe) -> str | None:
    """The directory or hub id of a tokenizer that is not trained; None for GPT-2's, which is here.

    Raises:
        UserError: when the model has no tokenizer.
    """
    if recipe.tokenizer != "auto":
        return recipe.tokenizer
    gpt2_rows = [row for row in MODELS.values() if row.model_type == "gpt2"]
    if recipe.model in {row.name for row in gpt2_rows} | {row.hub_id for row in gpt2_rows}:
        return None
    row = MODELS.get(recipe.model)
    if row is not None and row.hub_id is None:
        raise UserError(
            f"{row.name} has no tokenizer of its own; give --set tokenizer=train, or "
            "--set tokenizer=DIRECTORY."
        )
    return weights_location(recipe.model)


def load_gpt2_tokenizer() -> TextTokenizer:
    """GPT-2's own vocabulary of 50,257, from the files in this package.

    >>> load_gpt2_tokenizer().encode(["Hello world"], max_length=8)[0].token_ids.tolist()
    [50256, 15496, 995, 50256]
    """
    from transformers import GPT2Tokenizer

    # From the folder: in transformers 5 the keywords vocab_file= and merges_file= are accepted and
    # ignored, and the tokenizer is empty.
    return _wrap(GPT2Tokenizer.from_pretrained(GPT2_VOCABULARY), "GPT-2 vocabulary")


def load_saved_tokenizer(directory: Path) -> TextTokenizer:
    """The tokenizer that `TextTokenizer.save` wrote; needs no network.

    Raises:
        UserError: when the directory holds no tokenizer.
    """
    _require_vocabulary(directory)
    return _load(str(directory), str(directory), local_files_only=True)


def _from_pretrained(name: str) -> TextTokenizer:
    path, is_here = _find(name)
    return _load(path, name, local_files_only=is_here)


def _find(name: str) -> tuple[str, bool]:
    """What `AutoTokenizer` is given for a directory or hub id, and whether that is on this machine.

    Raises:
        UserError: when it is nowhere.
    """
    # A tokenizer alone has no config.json.
    directory = Path(name) if os.path.isdir(name) else local_model(name)
    if directory is not None:
        _require_vocabulary(directory)
        return str(directory), True
    # A file that is on this machine needs no hub; a hub that does not answer is not asked twice.
    if _in_hub_cache(name):
        return name, True
    answer = ask_hub(name, "model")
    if answer is HubAnswer.MISSING:
        raise UserError(
            f"The tokenizer {name} is neither a directory nor a model on the Hugging Face hub "
            "that you may read; check the name, or log in with `hf auth login`."
        )
    if answer is HubAnswer.UNREACHABLE:
        raise UserError(
            f"The tokenizer {name} is not on this machine and the Hugging Face hub "
            f"{why_unreachable()}; fetch it where there is a network with `hf download {name}` "
            "(HF_HOME names the cache), or give --set tokenizer=DIRECTORY, or --init scratch "
            "with --set tokenizer=train."
        )
    return name, False


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(
            isinstance(try_to_load_from_cache(name, file), str)
            for file in ("tokenizer.json", "vocab.json", "tokenizer.model")
        )
    except HFValidationError:
        return False


def _require_vocabulary(directory: Path) -> None:
    # Without this look, AutoTokenizer makes an empty tokenizer from a bare config.json.
    vocabularies = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
    if not any((directory / file).is_file() for file in vocabularies):
        raise UserError(
            f"{directory} holds no tokenizer ({', '.join(vocabularies)}); give "
            "--set tokenizer=DIRECTORY, or --init scratch with --set tokenizer=train."
        )


def _load(path: str, name: str, *, local_files_only: bool) -> TextTokenizer:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                path, use_fast=True, trust_remote_code=False, local_files_only=local_files_only
            )
    except Exception as error:  # whatever the many tokenizer classes raise on files they cannot use
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"The tokenizer {name} cannot be loaded ({reason}); give --set tokenizer=DIRECTORY "
            "with a tokenizer.json in it."
        ) from None
    return _wrap(tokenizer, name)


def _wrap(tokenizer: Any, name: str) -> TextTokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"The tokenizer {name} is not a fast one ({type(tokenizer).__name__}); give "
            "--set tokenizer=DIRECTORY with a tokenizer.json in it."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer {name} has no end-of-sequence token, which ends every document; set "
            "eos_token in its tokenizer_config.json, or choose another tokenizer."
        )
    eos = int(tokenizer.eos_token_id)
    bos = eos if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
    # What a saved file may bring along, and would be applied silently.
    backend.no_truncation()
    backend.no_padding()
    fingerprint = hashlib.sha256(json.dumps([backend.to_str(), bos, eos]).encode()).hexdigest()[:32]
    backend.encode_special_tokens = True  # "<|endoftext|>" in a text is text
    return TextTokenizer(
        name=name,
        bos_token_id=bos,
        eos_token_id=eos,
        # The highest id counts, not the number of entries: some vocabularies have holes.
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        fingerprint=fingerprint,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        _tokenizer=tokenizer,
        _backend=backend,
    )


def _train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, special_tokens: list[str], progress: bool
) -> TextTokenizer:
    """A byte-level BPE of the training texts, the same for the same texts."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if iter(texts) is texts:  # read twice: once for the key and once for the training
        texts = list(texts)
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)

    def build(path: Path) -> None:
        with document_progress("Training the tokenizer", None, show=progress) as advance:
            tokenizer = _byte_level_bpe(_counted(texts, advance), vocab_size, special_tokens)
            path.write_text(tokenizer, encoding="utf-8")

    key = content_key(
        "bpe", 1, digest.hexdigest(), vocab_size, tokenizers.__version__, *special_tokens[1:]
    )
    path = cached_file("tokenizers", key, ".json", build)
    encoder = {"pad_token": PAD, "mask_token": MASK} if MASK in special_tokens else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, **encoder
    )
    return _wrap(tokenizer, f"BPE of {vocab_size:,} trained on the training split")


def _counted(texts: Iterable[str], advance: Any) -> Iterable[str]:
    for text in texts:
        yield text
        advance(1)


def _byte_level_bpe(texts: Iterable[str], vocab_size: int, special_tokens: list[str]) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str(pretty=True))
