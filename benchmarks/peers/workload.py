"""The documents and the initial weights that all sides of a comparison share."""

import json
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from accel_gpt2.catalog.datasets import DATASETS
from accel_gpt2.recipe import Layer, ResolvedRecipe
from accel_gpt2.recipe.resolving import resolve

if TYPE_CHECKING:
    from accel_gpt2.classify.prepare import PreparedData

# transformers' Trainer puts documents of similar length together within 50 batches, and wants four
# such pools; with fewer documents it quietly groups less.
_BATCHES = 200
_HELD_OUT_DOCUMENTS = 24
_MAX_LENGTH = 1024
_TOKENS = "tokens.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is trained on, in a folder that all sides read.

    Attributes:
        lengths: the row of `DATASETS` whose lengths the documents have.
        data: folder with that data set's own files; None for synthetic documents.
        nanogpt: folder with a copy of nanoGPT.
        documents_per_step: of each optimizer step, on average where a side counts tokens.
    """

    folder: Path
    lengths: str
    data: Path | None
    nanogpt: Path | None
    num_layers: int
    width: int
    documents_per_step: int
    learning_rate: float = 6e-4
    weight_decay: float = 0.1
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 0

    @property
    def model(self) -> Path:
        """The initial weights and the tokenizer, as transformers loads them."""
        return self.folder / "model"

    @property
    def num_heads(self) -> int:
        """Of 64 dimensions, as in every GPT-2."""
        return max(1, self.width // 64)

    @property
    def num_texts(self) -> int:
        """Enough for the training; a fifth of a file is kept aside as a test split."""
        return round(1.3 * _BATCHES * self.documents_per_step) + _HELD_OUT_DOCUMENTS

    def write(self) -> None:
        """Leave the settings where `read_workload` finds them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "workload.json").write_text(json.dumps(asdict(self), default=str))


def read_workload(folder: Path) -> Workload:
    """What `Workload.write` wrote."""
    values = json.loads((folder / "workload.json").read_text("utf-8"))
    for name in ("folder", "data", "nanogpt"):
        values[name] = None if values[name] is None else Path(values[name])
    return Workload(**values | {"adam_betas": tuple(values["adam_betas"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """The tokens that every side sees: BOS, tokens, EOS of each document."""

    train: list[NDArray[Any]]
    held_out: list[NDArray[Any]]
    pad_token_id: int  # a token that no document has: padding with EOS would leave EOS untrained

    @property
    def tokens_per_document(self) -> float:
        """Predicted ones, EOS included, on average."""
        return float(np.mean([len(document) - 1 for document in self.train]))

    def budget_of_a_step(self, work: Workload) -> int:
        """Tokens for as many documents as the others have on average: a budget leaves out the one
        that no longer fits, half of it on average."""
        return round((work.documents_per_step + 0.5) * self.tokens_per_document)

    def rows_of_a_step(self, work: Workload) -> tuple[int, int]:
        """How many rows of how many tokens make a step, where rows need not be documents: as long
        as the model allows."""
        step_tokens = round(work.documents_per_step * self.tokens_per_document)
        return max(1, round(step_tokens / _MAX_LENGTH)), min(step_tokens, _MAX_LENGTH)

    def stream(self) -> NDArray[Any]:
        """All training documents after one another, with one EOS between two of them."""
        return np.concatenate([document[1:] for document in self.train])

    def lists(self) -> list[list[int]]:
        """The training documents as `datasets` takes them."""
        return [document.tolist() for document in self.train]


def our_recipe(work: Workload, *, global_batch_tokens: int = 8192) -> ResolvedRecipe:
    """What our own side trains by; the documents depend on its data settings alone."""
    values = {
        "model": str(work.model),
        "init": "pretrained",
        "dataset": str(work.folder / "documents.jsonl"),
        "objective": "unconditional",
        "max_length": _MAX_LENGTH,
        "validation_documents": _HELD_OUT_DOCUMENTS,
        "validation_fraction": 0.5,
        "dropout": 0.0,
        "epochs": 1000.0,
        "global_batch_tokens": global_batch_tokens,
        "learning_rate": work.learning_rate,
        "lr_schedule": "constant",
        "warmup_fraction": 0.0,
        "weight_decay": work.weight_decay,
        "adam_beta1": work.adam_betas[0],
        "adam_beta2": work.adam_betas[1],
        "adam_epsilon": work.adam_epsilon,
        "max_grad_norm": work.max_grad_norm,
        "seed": work.seed,
        "trackers": (),
    }
    return resolve([Layer(origin="benchmark", values=values)])


def prepared(work: Workload) -> "PreparedData":
    """The documents as a training of ours reads them, tokenised once for all sides."""
    from accel_gpt2.classify.prepare import prepare_data

    os.environ["ACCEL_GPT2_CACHE"] = str(work.folder / "cache")
    return prepare_data(our_recipe(work).recipe, progress=False)


def read_documents(work: Workload) -> Documents:
    """What `prepare` left."""
    with np.load(work.folder / _TOKENS) as saved:
        train, held_out = (
            np.split(saved[f"{name}_tokens"], saved[f"{name}_ends"][:-1])
            for name in ("train", "held_out")
        )
        return Documents(train=train, held_out=held_out, pad_token_id=int(saved["pad_token_id"]))


def _write_documents(work: Workload) -> None:
    data = prepared(work)
    arrays: dict[str, NDArray[Any]] = {}
    for name, part in (("train", data.train), ("held_out", data.validation)):
        documents = [part.document(index) for index in range(len(part))]
        arrays[f"{name}_tokens"] = np.concatenate(documents).astype(np.int64)
        arrays[f"{name}_ends"] = np.cumsum(part.lengths)
    seen = np.concatenate([arrays["train_tokens"], arrays["held_out_tokens"]])
    unseen = np.setdiff1d(np.arange(data.tokenizer.vocab_size), seen)
    np.savez(work.folder / _TOKENS, pad_token_id=unseen[0], **arrays)  # type: ignore[arg-type]


def prepare(work: Workload) -> dict[str, Any]:
    """Write documents, tokenizer and initial weights; what a reader of the results wants to know.

    Raises:
        UserError: when the data cannot be used.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from accel_gpt2.data.tokenizer import load_gpt2_tokenizer

    tokenizer = load_gpt2_tokenizer()
    torch.manual_seed(work.seed)
    config = GPT2Config(
        n_layer=work.num_layers,
        n_embd=work.width,
        n_head=work.num_heads,
        vocab_size=tokenizer.vocab_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    GPT2LMHeadModel(config).save_pretrained(work.model)
    tokenizer.save(work.model)
    texts = _synthetic_texts(work) if work.data is None else _texts(work, work.data)
    with (work.folder / "documents.jsonl").open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"text": text, "label": number % 2}) + "\n")
    _write_documents(work)
    documents = read_documents(work)
    lengths = np.array([len(document) - 1 for document in documents.train])
    return {
        "train_documents": len(documents.train),
        "tokens_per_document": documents.tokens_per_document,
        "tokens_of_longest": int(lengths.max()),
        # The sequence length that the average token sees.
        "context_tokens": float((lengths**2).sum() / lengths.sum()),
        "vocab_size": tokenizer.vocab_size,
    }


def _texts(work: Workload, data: Path) -> list[str]:
    import pyarrow.parquet as pq

    files = sorted((data / work.lengths).glob("train*.parquet"))
    texts: list[str] = pq.read_table(files[0], columns=["text"])["text"].to_pylist()
    random.Random(work.seed).shuffle(texts)
    return texts[: work.num_texts]


def _synthetic_texts(work: Workload) -> list[str]:
    """Words drawn by Zipf's law, each one token, as many as documents of the data set have."""
    from accel_gpt2.data.tokenizer import load_gpt2_tokenizer

    tokenizer = load_gpt2_tokenizer()
    pieces = (tokenizer.decode([index]) for index in range(tokenizer.vocab_size))
    words = [x for x in pieces if x.startswith(" ") and x[1:].isascii() and x[1:].isalpha()]
    draw = np.random.default_rng(work.seed)
    frequencies = 1 / np.arange(1.0, len(words) + 1)
    tokens, counts = zip(*DATASETS[work.lengths].token_lengths, strict=True)
    sizes = draw.choice(tokens, work.num_texts, p=np.divide(counts, sum(counts)))
    drawn = draw.choice(words, sizes.sum(), p=frequencies / frequencies.sum())
    return ["".join(part)[1:] for part in np.split(drawn, np.cumsum(sizes)[:-1])]
