"""How good is a run: every document scored once under every class, and what follows from it."""

import contextlib
import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from accel_gpt2.classify.baseline import tfidf_logistic_regression
from accel_gpt2.classify.bayes import predict
from accel_gpt2.classify.calibration import Calibration
from accel_gpt2.classify.card import write_card
from accel_gpt2.classify.lock import hold
from accel_gpt2.classify.metrics import (
    bits_per_byte_matrix,
    bits_per_token_matrix,
    classification_metrics,
    mcnemar_exact,
    paired_accuracy_difference_interval,
)
from accel_gpt2.classify.run import CALIBRATION, PREPARE_LOCK, Run, open_run
from accel_gpt2.classify.scores import Scores, score_run
from accel_gpt2.classify.validation import write_calibration
from accel_gpt2.data.cache import cache_directory
from accel_gpt2.data.sources import NO_TEST_SPLIT, TextData, load_documents, load_text_data
from accel_gpt2.data.tokenized import TokenizedDocuments, tokenize_documents
from accel_gpt2.durable import make_directory, write_json, writing
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import Pll
from accel_gpt2.train.model import load_final_tokenizer
from accel_gpt2.train.peers import watching_peers
from accel_gpt2.train.processes import (
    build_accelerator,
    is_first_process,
    on_first_process,
    one_process_at_a_time,
)
from accel_gpt2.train.progress import TrainProgress

_BASELINE_KEYS = ("accuracy", "accuracy_interval_95", "macro_f1", "recall", "confusion_matrix")


def evaluate_run(
    run_directory: Path,
    *,
    dataset: str | None = None,
    split: str | None = None,
    pll: Pll = "full",
    baseline: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score a split under every class of a trained run; write and return the metrics.

    The run's own test split goes to `evaluation/`, anything else to
    `evaluation-<dataset>-<split>/`, and estimates of pseudo-log-likelihoods to folders that end in
    `-<pll>-masks`. Scores are kept there and are not computed again while models and documents are
    the same. Under a launcher all processes call this together; each document is scored once.

    Args:
        dataset, split: None for the run's own.
        pll: how masked language models score; estimates are there to be compared with "full".
        baseline: whether TF-IDF + logistic regression is trained beside it.

    Raises:
        UsageError: when another way of scoring is asked of what is no masked language model.
        UserError: when the run is not trained to the end, its text has changed since, or the
            documents cannot be read, or when another process is at work in the directory.
    """
    run = open_run(run_directory)
    if pll != "full" and run.recipe.objective != "masked_lm":
        raise UsageError(
            f"--pll {pll}: {run_directory} was trained with objective = "
            f"{run.recipe.objective!r}, which has one way of scoring; leave the option out."
        )
    talks = is_first_process()
    with watching_peers(), hold(run_directory) if talks else contextlib.nullcontext():
        return _evaluate(
            run,
            dataset=dataset,
            split=split,
            pll=pll,
            baseline=baseline,
            talks=talks,
            quiet=quiet,
        )


def _evaluate(
    run: Run,
    *,
    dataset: str | None,
    split: str | None,
    pll: Pll,
    baseline: bool,
    talks: bool,
    quiet: bool,
) -> dict[str, Any]:
    run_directory = run.directory
    with one_process_at_a_time(cache_directory() / PREPARE_LOCK):
        text = load_text_data(run.recipe, progress=talks and not quiet)
        if text.fingerprint != run.data_fingerprint:
            raise UserError(
                f"The text of {run.recipe.dataset} has changed since {run_directory} was trained, "
                "so documents of today's test split may have been trained on; bring the earlier "
                "text back, or train again with --resume never."
            )
        own = dataset in (None, run.recipe.dataset) and split in (None, run.recipe.test_split)
        if own and run.recipe.test_split == NO_TEST_SPLIT:
            raise UserError(
                f"{run_directory} was trained on all of its documents (test_split = none), so none "
                "are left to test it on; give --dataset with others."
            )
        documents = text.test if own else _other_documents(run, dataset, split)
        tokenizer = load_final_tokenizer(run.finals[0])
        tokens, validation = (
            tokenize_documents(
                part,
                tokenizer,
                run.recipe.max_length,
                description=name,
                progress=talks and not quiet,
            )
            for name, part in (("test", documents), ("validation", text.validation))
        )
    label = re.sub(r"[^\w.-]+", "-", f"{dataset or run.recipe.dataset}-{split or 'test'}")
    name = "evaluation" if own else f"evaluation-{label}"
    folder = run_directory / (name if pll == "full" else f"{name}-{pll}-masks")
    accelerator = build_accelerator(run.recipe)
    on_first_process(accelerator, partial(_make_folder, folder))
    with TrainProgress(shown=talks, quiet=quiet) as progress:
        calibration_path = run_directory / CALIBRATION
        if run.recipe.objective == "masked_lm":  # fitted on what is estimated in the same way
            calibration_path = folder / CALIBRATION
            _calibrate_estimates(run, validation, folder, pll, accelerator, progress)
        scores = score_run(run, tokens, folder / "scores.parquet", accelerator, progress, pll=pll)
        if baseline:
            progress.say("TF-IDF + logistic regression, for comparison")

    def write_metrics() -> dict[str, Any]:
        metrics = {
            "dataset": dataset or run.recipe.dataset,
            "split": split or run.recipe.test_split,
            **_metrics(run, text, tokens, scores, calibration_path),
            "baseline": _baseline(run, text, documents, tokens, scores) if baseline else None,
        }
        write_json(folder / "metrics.json", metrics)
        if own and pll == "full":
            plan = json.loads((run_directory / "plan.json").read_text(encoding="utf-8"))
            write_card(run_directory, run.recipe, plan, metrics=metrics)
        return metrics

    return on_first_process(accelerator, write_metrics)


def _make_folder(folder: Path) -> None:
    with writing(folder):
        make_directory(folder)


def _other_documents(run: Run, dataset: str | None, split: str | None) -> datasets.Dataset:
    same = dataset in (None, run.recipe.dataset)
    own_split = run.recipe.test_split
    return load_documents(
        dataset or run.recipe.dataset,
        split or ("test" if own_split == NO_TEST_SPLIT else own_split),
        run.class_names,
        text_field=run.recipe.text_field if same else "auto",
        label_field=run.recipe.label_field if same else "auto",
    )


def _calibrate_estimates(
    run: Run,
    validation: TokenizedDocuments,
    folder: Path,
    pll: Pll,
    accelerator: Any,
    progress: TrainProgress,
) -> None:
    scores = score_run(
        run, validation, folder / "validation_scores.parquet", accelerator, progress, pll=pll
    )
    num_tokens = validation.lengths.astype(np.int64) - 1
    path, labels = folder / CALIBRATION, validation.labels.astype(np.int64)
    on_first_process(
        accelerator,
        lambda: write_calibration(path, scores.values, run.log_prior, num_tokens, labels),
    )


def _metrics(
    run: Run,
    text: TextData,
    tokens: TokenizedDocuments,
    scores: Scores,
    calibration_path: Path,
) -> dict[str, Any]:
    labels = tokens.labels.astype(np.int64)
    num_tokens = tokens.lengths.astype(np.int64) - 1
    calibration = Calibration.read(calibration_path, len(run.class_names))
    majority = int(np.argmax(run.class_counts))
    records = run.training_records()
    seconds = sum(record.seconds for record in records)
    document_tokens = sum(record.document_tokens for record in records)
    price = run.recipe.price_usd_per_hour
    bits: dict[str, Any] = {"bits_per_byte": None, "bits_per_token": None}
    if run.recipe.objective != "classification":
        bits = {
            "bits_per_byte": bits_per_byte_matrix(labels, scores.values, tokens.num_bytes).tolist(),
            "bits_per_token": bits_per_token_matrix(labels, scores.values, num_tokens).tolist(),
        }
    return {
        "model": run.recipe.model,
        "objective": run.recipe.objective,
        "num_documents": len(labels),
        "class_names": list(run.class_names),
        **classification_metrics(
            labels,
            scores.values,
            run.log_prior,
            calibration,
            num_tokens,
            run.class_names,
            seed=run.recipe.seed,
        ),
        **bits,
        "documents_per_second": len(labels) / scores.seconds if scores.seconds > 0 else None,
        "scoring_seconds": scores.seconds,
        "majority_class_accuracy": float((labels == majority).mean()),
        "truncated_documents": int(tokens.truncated.sum()),
        "data_treatments": [dataclasses.asdict(treatment) for treatment in text.treatments],
        "calibration": json.loads(calibration_path.read_text(encoding="utf-8")),
        "training": {
            "seconds": seconds,
            "document_tokens": document_tokens,
            "tokens_per_second": document_tokens / seconds if seconds > 0 else None,
            "peak_memory_bytes": max(record.peak_memory_bytes for record in records),
            "cost_usd": None if price is None else price * seconds / 3600,
        },
    }


def _baseline(
    run: Run,
    text: TextData,
    documents: datasets.Dataset,
    tokens: TokenizedDocuments,
    scores: Scores,
) -> dict[str, Any]:
    labels = tokens.labels.astype(np.int64)
    seed = run.recipe.seed
    correct = predict(scores.values, run.log_prior) == labels
    baseline = tfidf_logistic_regression(
        text.train["text"][:], text.train["label"][:], documents["text"][:], seed=seed
    )
    baseline_correct = baseline.predictions == labels
    # A discriminative model has one posterior and no calibration of ours.
    metrics = classification_metrics(
        labels,
        np.log(np.maximum(baseline.probabilities, 1e-300)),
        np.zeros(len(run.class_names)),
        Calibration.identity(len(run.class_names)),
        tokens.lengths.astype(np.int64) - 1,
        run.class_names,
        seed=seed,
    )
    return {
        "name": "TF-IDF + logistic regression",
        "description": baseline.description,
        **{key: metrics[key] for key in _BASELINE_KEYS},
        **{key: metrics["raw"][key] for key in ("nll", "brier", "ece")},
        "mcnemar": mcnemar_exact(correct, baseline_correct),
        "accuracy_difference_interval_95": paired_accuracy_difference_interval(
            correct, baseline_correct, seed=seed
        ),
        "seconds": baseline.seconds,
    }
