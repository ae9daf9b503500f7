"""The classical arms see what the language models see, and their evaluation has the same form."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss

from accel_gpt2.catalog.arms import ARMS
from accel_gpt2.classify.baseline import fit_ngram_models, tfidf_logistic_regression
from accel_gpt2.classify.untrained import evaluate_classical, kept_texts, read_compared_data
from accel_gpt2.recipe import TrainRecipe

from .conftest import resolve_tiny

MAX_LENGTH = 12  # most documents have more


@pytest.fixture
def recipe(texts_file: Path) -> TrainRecipe:
    """Three classes, documents cut at 10 tokens of text."""
    return resolve_tiny(texts_file, max_length=MAX_LENGTH).recipe


def test_kept_texts_are_what_the_tokens_stand_for(tmp_path: Path) -> None:
    """Decoding a document's tokens gives its kept text, also where bytes and characters differ;
    what fits is kept whole."""
    words = ["naïve", "café", "Ünder", "straße", "日本語", "boat"]
    rows = [f"{' '.join([*words[i % 6 :], str(i)])},{'ab'[i % 2]}" for i in range(60)]
    path = tmp_path / "texts.csv"
    path.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    data = read_compared_data(resolve_tiny(path, max_length=7).recipe)
    kept = kept_texts(data.text.test, data.test)
    originals = data.text.test["text"][:]
    assert 0 < data.test.truncated.sum() < len(kept)
    for index, (text, original) in enumerate(zip(kept, originals, strict=True)):
        tokens = data.test.document(index)[1:-1]
        decoded = data.tokenizer.decode(tokens.tolist()).removesuffix("\N{REPLACEMENT CHARACTER}")
        assert original.startswith(text)
        assert text.startswith(decoded)
        assert len(text) - len(decoded) <= 1  # a character cut in its middle counts whole
        assert (text == original) or data.test.truncated[index]


@pytest.fixture
def evaluated(recipe: TrainRecipe, tmp_path: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Scores and metrics of both classical arms."""
    found = {}
    for arm in (ARMS["1a"], ARMS["1b"]):
        evaluate_classical(tmp_path / arm.id, arm, recipe, quiet=True)
        folder = tmp_path / arm.id / "evaluation"
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        found[arm.id] = (pq.read_table(folder / "scores.parquet").to_pandas(), metrics)
    return found


def test_scores_are_the_classifiers_on_the_kept_text(
    evaluated: dict[str, tuple[Any, dict[str, Any]]], recipe: TrainRecipe
) -> None:
    """log p(c|x) of the regression and log p(x|c) of the n-gram models, each on the cut text."""
    data = read_compared_data(recipe)
    assert data.test.truncated.any()
    train, labels = kept_texts(data.text.train, data.train), data.train.labels.tolist()
    test = kept_texts(data.text.test, data.test)
    probabilities = tfidf_logistic_regression(train, labels, test).probabilities
    likelihoods = fit_ngram_models(train, labels).log_likelihoods(test)
    for id_, column, expected in (
        ("1a", "log_probability", np.log(probabilities)),
        ("1b", "log_likelihood", likelihoods),
    ):
        table = evaluated[id_][0]
        scores = table[[f"{column}_{index}" for index in range(3)]].to_numpy()
        np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-9)


def test_metrics_follow_from_the_scores(
    evaluated: dict[str, tuple[Any, dict[str, Any]]], recipe: TrainRecipe
) -> None:
    """The regression's own posterior has no prior added; Bayes' rule adds the training counts."""
    table, metrics = evaluated["1a"]
    probabilities = np.exp(table[[f"log_probability_{index}" for index in range(3)]].to_numpy())
    assert metrics["raw"]["nll"] == pytest.approx(log_loss(table["label"], probabilities))
    assert metrics["bits_per_byte"] is None
    assert metrics["log_prior"] == [0, 0, 0]

    table, metrics = evaluated["1b"]
    counts = np.bincount(read_compared_data(recipe).train.labels)
    assert metrics["log_prior"] == pytest.approx(np.log(counts / counts.sum()))
    joint = table[[f"log_likelihood_{index}" for index in range(3)]] + metrics["log_prior"]
    assert (table["prediction"] == joint.to_numpy().argmax(axis=1)).all()
    assert metrics["accuracy"] == pytest.approx((table["prediction"] == table["label"]).mean())
    assert metrics["bits_per_byte"] is None  # its unknown word has no bytes
