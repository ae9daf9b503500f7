"""Counts what the rows of catalog/datasets.py say about their data sets.

    ACCEL_GPT2_DATA=FOLDER python benchmarks/token_lengths.py imdb ag_news

Prints documents per class, pairs of tokens:documents in bins a tenth wide, tokens of trained
vocabularies for each of GPT-2's, and the exact means that tests/plan/test_data.py holds the row to.
A few minutes for each data set.
"""

import dataclasses
import itertools
import math
import sys
from collections import Counter

import numpy as np

from accel_gpt2.data.sources import load_text_data
from accel_gpt2.data.tokenizer import TextTokenizer, load_gpt2_tokenizer, load_tokenizer
from accel_gpt2.recipe import TrainRecipe

_BIN_RATIO = 1.1
_VOCABULARIES = (4096, 8192, 16384)
_MAX_LENGTHS = (128, 256, 512, 1024)


def _num_tokens(tokenizer: TextTokenizer, texts: list[str]) -> np.ndarray:
    lengths = []
    for start in range(0, len(texts), 256):
        encoded = tokenizer.encode(texts[start : start + 256], max_length=10**6)
        lengths += [len(document.token_ids) - 2 for document in encoded]
    return np.array(lengths)


def _bins(lengths: np.ndarray) -> str:
    edges = [1]
    while edges[-1] <= lengths.max():
        edges.append(max(edges[-1] + 1, math.ceil(edges[-1] * _BIN_RATIO)))
    inside = [
        lengths[(lengths >= low) & (lengths < high)] for low, high in itertools.pairwise(edges)
    ]
    return " ".join(f"{round(x.mean())}:{len(x)}" for x in inside if len(x))


def _print_row(name: str) -> None:
    recipe = TrainRecipe(dataset=name, model="gpt2-tiny", init="scratch")
    data = load_text_data(recipe)
    labels = Counter([*data.train["label"], *data.validation["label"]])
    test_labels = Counter(data.test["label"])
    texts = [*data.train["text"], *data.validation["text"]]
    lengths = _num_tokens(load_gpt2_tokenizer(), texts)
    lines = [
        f"{name}: train_documents={tuple(labels[i] for i in sorted(labels))}",
        f"test_documents={tuple(test_labels[i] for i in sorted(test_labels))}",
        f"token_lengths: {_bins(lengths)}",
    ]
    for max_length in _MAX_LENGTHS:
        cut = np.minimum(lengths, max_length - 2) + 1.0
        context = (cut**2).sum() / cut.sum()
        lines.append(f"max_length {max_length}: mean {cut.mean():.2f}, context {context:.2f}")
    for size in _VOCABULARIES:
        own = dataclasses.replace(recipe, tokenizer="train", tokenizer_vocab_size=size)
        trained = _num_tokens(load_tokenizer(own, data.train["text"]), texts)
        lines.append(f"vocabulary {size}: {trained.sum() / lengths.sum():.3f}")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    for dataset in sys.argv[1:]:
        _print_row(dataset)
