"""The arms that the training loop has no part in, as run directories that are evaluated already.

TF-IDF with logistic regression and n-gram models take seconds, and a zero-shot model is not trained
at all. They see the documents of the other arms: the same splits, and of each document the text
that is left when it is cut at the recipe's `max_length`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from accel_gpt2.catalog.arms import ArmSpec
from accel_gpt2.classify.baseline import fit_ngram_models, tfidf_logistic_regression
from accel_gpt2.classify.bayes import FloatArray, log_priors, predict
from accel_gpt2.classify.calibration import fit_calibration
from accel_gpt2.classify.evaluations import METRICS
from accel_gpt2.classify.metrics import (
    bits_per_byte_matrix,
    bits_per_token_matrix,
    classification_metrics,
)
from accel_gpt2.classify.out_of_distribution import OtherTexts, write_out_of_distribution
from accel_gpt2.classify.run import CALIBRATION, write_recipe
from accel_gpt2.classify.scores import InMemoryDocuments
from accel_gpt2.data.sources import TextData, load_text_data
from accel_gpt2.data.tokenized import Texts, TokenizedDocuments, tokenize_documents
from accel_gpt2.data.tokenizer import TextTokenizer, load_tokenizer
from accel_gpt2.durable import make_directory, write_json, writing
from accel_gpt2.recipe import TrainRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedData:
    """The text of a comparison, and the tokens by which its documents are cut and counted."""

    text: TextData
    tokenizer: TextTokenizer
    train: TokenizedDocuments
    validation: TokenizedDocuments
    test: TokenizedDocuments

    @property
    def class_counts(self) -> dict[str, list[int]]:
        """Documents of each class in each split."""
        return {
            name: np.bincount(split.labels, minlength=len(self.text.class_names)).tolist()
            for name, split in (
                ("train", self.train),
                ("validation", self.validation),
                ("test", self.test),
            )
        }


def read_compared_data(
    recipe: TrainRecipe, *, max_length: int | None = None, progress: bool = False
) -> ComparedData:
    """Read, split and tokenise the recipe's data set, or take it from the cache.

    Args:
        max_length: in place of the recipe's.

    Raises:
        UserError: when the data or the tokenizer cannot be had.
    """
    text = load_text_data(recipe, progress=progress)
    tokenizer = load_tokenizer(recipe, Texts(text.train), progress=progress)
    train, validation, test = (
        tokenize_documents(
            split, tokenizer, max_length or recipe.max_length, description=name, progress=progress
        )
        for name, split in (
            ("train", text.train),
            ("validation", text.validation),
            ("test", text.test),
        )
    )
    return ComparedData(
        text=text, tokenizer=tokenizer, train=train, validation=validation, test=test
    )


def kept_texts(documents: datasets.Dataset, tokens: TokenizedDocuments) -> list[str]:
    """What a language model sees of each document: its beginning, where it was cut."""
    return [
        text.encode("utf-8")[:num_bytes].decode("utf-8")
        for text, num_bytes in zip(Texts(documents), tokens.num_bytes.tolist(), strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class UntrainedScores:
    """What a classifier says of the validation and test documents, [documents, classes] in nats.

    `is_posterior`: the scores are log p(c|x) and not log p(x|c), and `log_prior`, [classes], is
    zero. `of_exact_text`: they are likelihoods of every byte, so that bits per byte mean something.
    `training_seconds` is what it took to fit, `scoring_seconds` to score the test documents.
    `others` are the scores of documents of no class, if there were any.
    """

    validation: FloatArray
    test: FloatArray
    others: FloatArray
    log_prior: FloatArray
    is_posterior: bool
    of_exact_text: bool
    description: str
    training_seconds: float
    scoring_seconds: float
    peak_memory_bytes: int | None = None


def tfidf_scores(
    data: ComparedData, others: Sequence[str], *, recipe: TrainRecipe
) -> UntrainedScores:
    """Arm 1a: logistic regression on TF-IDF of words and word pairs."""
    parts = [
        kept_texts(data.text.validation, data.validation),
        kept_texts(data.text.test, data.test),
        others,
    ]
    result = tfidf_logistic_regression(
        kept_texts(data.text.train, data.train),
        data.train.labels.tolist(),
        [text for part in parts for text in part],
        seed=recipe.seed,
    )
    log_probabilities = np.log(np.maximum(result.probabilities, np.finfo(np.float64).tiny))
    validation, test, other = np.split(log_probabilities, np.cumsum([len(x) for x in parts])[:-1])
    return UntrainedScores(
        validation=validation,
        test=test,
        others=other,
        log_prior=np.zeros(len(data.text.class_names)),
        is_posterior=True,
        of_exact_text=False,
        description=result.description,
        training_seconds=result.seconds,
        scoring_seconds=0.0,
    )


def ngram_scores(
    data: ComparedData, others: Sequence[str], *, recipe: TrainRecipe
) -> UntrainedScores:
    """Arm 1b: one n-gram language model per class and Bayes' rule."""
    started = time.monotonic()
    models = fit_ngram_models(kept_texts(data.text.train, data.train), data.train.labels.tolist())
    fitted = time.monotonic()
    test = models.log_likelihoods(kept_texts(data.text.test, data.test))
    scored = time.monotonic()
    held_out = kept_texts(data.text.validation, data.validation)
    return UntrainedScores(
        validation=models.log_likelihoods(held_out),
        test=test,
        others=models.log_likelihoods(others) if others else test[:0],
        log_prior=log_priors(data.class_counts["train"], recipe.priors),
        is_posterior=False,
        of_exact_text=False,
        description=models.description,
        training_seconds=fitted - started,
        scoring_seconds=scored - fitted,
    )


_CLASSICAL: Mapping[str, Callable[..., UntrainedScores]] = {"1a": tfidf_scores, "1b": ngram_scores}


def evaluate_classical(
    run_directory: Path,
    arm: ArmSpec,
    recipe: TrainRecipe,
    others: OtherTexts | None = None,
    *,
    quiet: bool = False,
) -> None:
    """Fit and evaluate one of the classical arms.

    Args:
        others: what it should notice to be no text of its own.

    Raises:
        UserError: when the data or the tokenizer cannot be had.
    """
    data = read_compared_data(recipe, progress=not quiet)
    encoded = [] if others is None else data.tokenizer.encode(others.texts, recipe.max_length)
    texts = [
        text.encode("utf-8")[: document.num_bytes].decode("utf-8")
        for text, document in zip([] if others is None else others.texts, encoded, strict=True)
    ]
    scores = _CLASSICAL[arm.id](data, texts, recipe=recipe)
    write_untrained(run_directory, recipe, data, scores)
    if others is not None:
        num_tokens = InMemoryDocuments(encoded).lengths - 1
        write_out_of_distribution(run_directory, arm, others, scores.others, num_tokens)


def write_untrained(
    run_directory: Path, recipe: TrainRecipe, data: ComparedData, scores: UntrainedScores
) -> None:
    """Write a run directory's recipe, calibration and evaluation.

    The evaluation has the form of every other arm's, and `metrics.json` is written last.
    """
    folder = run_directory / "evaluation"
    with writing(folder):
        make_directory(folder)
    write_recipe(run_directory, recipe)
    calibration = fit_calibration(
        scores.validation,
        scores.log_prior,
        _predicted_tokens(data.validation),
        data.validation.labels,
    )
    write_json(run_directory / CALIBRATION, calibration.to_json())
    _write_scores(folder / "scores.parquet", data.test, scores)
    labels, num_tokens = data.test.labels, _predicted_tokens(data.test)
    bits: dict[str, Any] = {"bits_per_byte": None, "bits_per_token": None}
    if scores.of_exact_text:
        bits = {
            "bits_per_byte": bits_per_byte_matrix(
                labels, scores.test, data.test.num_bytes
            ).tolist(),
            "bits_per_token": bits_per_token_matrix(labels, scores.test, num_tokens).tolist(),
        }
    majority = int(np.argmax(data.class_counts["train"]))
    price = recipe.price_usd_per_hour
    metrics = {
        "dataset": recipe.dataset,
        "split": recipe.test_split,
        "num_documents": len(labels),
        "class_names": list(data.text.class_names),
        "description": scores.description,
        **classification_metrics(
            labels,
            scores.test,
            scores.log_prior,
            calibration,
            num_tokens,
            data.text.class_names,
            seed=recipe.seed,
        ),
        **bits,
        "documents_per_second": len(labels) / scores.scoring_seconds
        if scores.scoring_seconds > 0
        else None,
        "scoring_seconds": scores.scoring_seconds,
        "majority_class_accuracy": float((labels == majority).mean()),
        "truncated_documents": int(data.test.truncated.sum()),
        "calibration": calibration.to_json(),
        "log_prior": scores.log_prior.tolist(),
        "training": {
            "seconds": scores.training_seconds,
            "document_tokens": None,
            "tokens_per_second": None,
            "peak_memory_bytes": scores.peak_memory_bytes,
            "cost_usd": None if price is None else price * scores.training_seconds / 3600,
        },
    }
    write_json(folder / METRICS, metrics)


def _predicted_tokens(tokens: TokenizedDocuments) -> NDArray[np.int64]:
    return tokens.lengths.astype(np.int64) - 1


def _write_scores(path: Path, tokens: TokenizedDocuments, scores: UntrainedScores) -> None:
    column = "log_probability" if scores.is_posterior else "log_likelihood"
    table: dict[str, Sequence[Any] | NDArray[Any]] = {
        "document": tokens.rows,
        "label": tokens.labels,
        "num_tokens": _predicted_tokens(tokens),
        "num_bytes": tokens.num_bytes,
        "truncated": tokens.truncated,
        "prediction": predict(scores.test, scores.log_prior),
        **{f"{column}_{index}": x for index, x in enumerate(scores.test.T)},
    }
    staging = path.with_name(f".staging-{path.name}")
    with writing(path):
        pq.write_table(pa.table(table), staging)
        staging.replace(path)
