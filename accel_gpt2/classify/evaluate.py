"""How good is a run: every document scored once under every class, and what follows from it."""

import contextlib
import dataclasses
import hashlib
import json
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from annotated_types import Ge
from numpy.typing import NDArray
from pydantic import TypeAdapter

from accel_gpt2.classify.baseline import tfidf_logistic_regression
from accel_gpt2.classify.bayes import log_priors, predict
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
from accel_gpt2.classify.run import (
    CALIBRATION,
    PREPARE_LOCK,
    Run,
    open_run,
    read_training_record,
)
from accel_gpt2.data.cache import cache_directory
from accel_gpt2.data.sources import NO_TEST_SPLIT, TextData, load_documents, load_text_data
from accel_gpt2.data.tokenized import TokenizedDocuments, tokenize_documents
from accel_gpt2.durable import make_directory, write_json, writing
from accel_gpt2.errors import UserError
from accel_gpt2.train.manifest import MANIFEST
from accel_gpt2.train.model import load_final, load_final_tokenizer
from accel_gpt2.train.peers import watching_peers
from accel_gpt2.train.processes import (
    build_accelerator,
    is_first_process,
    on_first_process,
    one_process_at_a_time,
)
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.scoring import score_documents

_FINGERPRINTS = b"accel_gpt2_fingerprints"
_BASELINE_KEYS = ("accuracy", "accuracy_interval_95", "macro_f1", "recall", "confusion_matrix")


def evaluate_run(
    run_directory: Path,
    *,
    dataset: str | None = None,
    split: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score a split under every class of a trained run; write and return the metrics.

    The run's own test split goes to `evaluation/`, anything else to
    `evaluation-<dataset>-<split>/`. Scores are kept in `scores.parquet` and are not computed again
    while models and documents are the same. Under a launcher all processes call this together;
    each document is scored once.

    Args:
        dataset, split: None for the run's own.

    Raises:
        UserError: when the run is not trained to the end, its text has changed since, or the
            documents cannot be read, or when another process is at work in the directory.
    """
    run = open_run(run_directory)
    talks = is_first_process()
    with watching_peers(), hold(run_directory) if talks else contextlib.nullcontext():
        return _evaluate(run, dataset=dataset, split=split, talks=talks, quiet=quiet)


def _evaluate(
    run: Run, *, dataset: str | None, split: str | None, talks: bool, quiet: bool
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
        tokens = tokenize_documents(
            documents,
            load_final_tokenizer(run.final(0)),
            run.recipe.max_length,
            description="test",
            progress=talks and not quiet,
        )
    label = re.sub(r"[^\w.-]+", "-", f"{dataset or run.recipe.dataset}-{split or 'test'}")
    folder = run_directory / ("evaluation" if own else f"evaluation-{label}")
    accelerator = build_accelerator(run.recipe)
    on_first_process(accelerator, partial(_make_folder, folder))
    with TrainProgress(shown=talks, quiet=quiet) as progress:
        scores = _score(run, tokens, folder / "scores.parquet", accelerator, progress)
        progress.say("TF-IDF + logistic regression, for comparison")

    def write_metrics() -> dict[str, Any]:
        metrics = {
            "dataset": dataset or run.recipe.dataset,
            "split": split or run.recipe.test_split,
            **_metrics(run, text, documents, tokens, scores),
        }
        write_json(folder / "metrics.json", metrics)
        if own:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Documents x classes, log p(x|c) in nats, and the time that scoring took where it is known."""

    log_likelihoods: NDArray[np.float64]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _ScoreRecord:
    """What a kept column of scores was made from, and what it holds."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True, "allow_inf_nan": False}

    key: str
    digest: str
    seconds: Annotated[float, Ge(0)]


_RECORDS = TypeAdapter(list[_ScoreRecord])


def _score(
    run: Run, tokens: TokenizedDocuments, path: Path, accelerator: Any, progress: TrainProgress
) -> Scores:
    """One class at a time, each kept as soon as it is done."""
    document_fingerprint = _fingerprint_documents(tokens)
    cached = _read_cached(path)
    columns: list[NDArray[np.float64]] = []
    records: list[_ScoreRecord] = []
    for index, name in enumerate(run.class_names):
        manifest = (run.final(index) / MANIFEST).read_bytes()
        key = hashlib.sha256(manifest + document_fingerprint.encode()).hexdigest()
        known = cached.get(index)
        if known is not None and known[0].key == key:
            records.append(known[0])
            columns.append(known[1])
            continue
        label = f"scoring under {name} ({index + 1}/{len(run.class_names)})"
        model = load_final(run.final(index), run.recipe).to(accelerator.device)
        progress.start(label, len(tokens))
        started = time.monotonic()
        done = 0

        def on_batch(num_documents: int, label: str = label, started: float = started) -> None:
            nonlocal done
            done += num_documents
            rate = done / max(1e-9, time.monotonic() - started)
            progress.update(label, done, len(tokens), f"{rate:.0f} documents/s")

        columns.append(
            score_documents(
                model,
                tokens,
                micro_batch_tokens=run.recipe.micro_batch_tokens,
                accelerator=accelerator,
                on_batch=on_batch,
            )
        )
        records.append(
            _ScoreRecord(key=key, digest=_digest(columns[-1]), seconds=time.monotonic() - started)
        )
        del model
        on_first_process(accelerator, partial(_write_scores, path, run, tokens, columns, records))
    on_first_process(accelerator, partial(_write_scores, path, run, tokens, columns, records))
    return Scores(
        log_likelihoods=np.stack(columns, axis=1),
        seconds=sum(record.seconds for record in records),
    )


def _fingerprint_documents(tokens: TokenizedDocuments) -> str:
    digest = hashlib.sha256()
    for index in range(len(tokens)):
        digest.update(tokens.document(index).tobytes())
    digest.update(tokens.labels.astype(np.int64).tobytes())
    return digest.hexdigest()


def _write_scores(
    path: Path,
    run: Run,
    tokens: TokenizedDocuments,
    columns: list[NDArray[np.float64]],
    records: list[_ScoreRecord],
) -> None:
    table: dict[str, NDArray[Any]] = {
        "document": tokens.rows.astype(np.int64),
        "label": tokens.labels.astype(np.int64),
        "num_tokens": tokens.lengths.astype(np.int64) - 1,
        "num_bytes": tokens.num_bytes.astype(np.int64),
        "truncated": tokens.truncated,
    }
    if len(columns) == len(run.class_names):
        log_prior = log_priors(run.class_counts, run.recipe.priors)
        table["prediction"] = predict(np.stack(columns, axis=1), log_prior).astype(np.int64)
    for index, column in enumerate(columns):
        table[f"log_likelihood_{index}"] = column
    arrow = pa.table(table).replace_schema_metadata({_FINGERPRINTS: _RECORDS.dump_json(records)})
    staging = path.with_name(f".staging-{path.name}")
    pq.write_table(arrow, staging)
    staging.replace(path)


def _read_cached(path: Path) -> dict[int, tuple[_ScoreRecord, NDArray[np.float64]]]:
    """Kept scores by class; what is not there or damaged is left out, and computed again."""
    try:
        table = pq.read_table(path)
        records = _RECORDS.validate_json((table.schema.metadata or {}).get(_FINGERPRINTS, b""))
        columns = [table[f"log_likelihood_{i}"].to_numpy() for i in range(len(records))]
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return {}
    known = enumerate(zip(records, columns, strict=True))
    return {
        i: (record, column) for i, (record, column) in known if record.digest == _digest(column)
    }


def _digest(column: NDArray[np.float64]) -> str:
    return hashlib.sha256(column.tobytes()).hexdigest()


def _metrics(
    run: Run,
    text: TextData,
    documents: datasets.Dataset,
    tokens: TokenizedDocuments,
    scores: Scores,
) -> dict[str, Any]:
    labels = tokens.labels.astype(np.int64)
    num_tokens = tokens.lengths.astype(np.int64) - 1
    log_prior = log_priors(run.class_counts, run.recipe.priors)
    calibration = Calibration.read(run.directory / CALIBRATION, len(run.class_names))
    seed = run.recipe.seed
    correct = predict(scores.log_likelihoods, log_prior) == labels

    baseline = tfidf_logistic_regression(
        text.train["text"][:], text.train["label"][:], documents["text"][:], seed=seed
    )
    baseline_correct = baseline.predictions == labels
    # A discriminative model has one posterior and no calibration of ours.
    baseline_metrics = classification_metrics(
        labels,
        np.log(np.maximum(baseline.probabilities, 1e-300)),
        np.zeros(len(run.class_names)),
        Calibration.identity(len(run.class_names)),
        num_tokens,
        run.class_names,
        seed=seed,
    )
    majority = int(np.argmax(run.class_counts))
    records = [read_training_record(run.final(i)) for i in range(len(run.class_names))]
    seconds = sum(record.seconds for record in records)
    document_tokens = sum(record.document_tokens for record in records)
    price = run.recipe.price_usd_per_hour
    return {
        "model": run.recipe.model,
        "num_documents": len(labels),
        "class_names": list(run.class_names),
        **classification_metrics(
            labels,
            scores.log_likelihoods,
            log_prior,
            calibration,
            num_tokens,
            run.class_names,
            seed=seed,
        ),
        "bits_per_byte": bits_per_byte_matrix(
            labels, scores.log_likelihoods, tokens.num_bytes
        ).tolist(),
        "bits_per_token": bits_per_token_matrix(
            labels, scores.log_likelihoods, num_tokens
        ).tolist(),
        "documents_per_second": len(labels) / scores.seconds if scores.seconds > 0 else None,
        "scoring_seconds": scores.seconds,
        "baseline": {
            "name": "TF-IDF + logistic regression",
            "description": baseline.description,
            **{key: baseline_metrics[key] for key in _BASELINE_KEYS},
            **{key: baseline_metrics["raw"][key] for key in ("nll", "brier", "ece")},
            "mcnemar": mcnemar_exact(correct, baseline_correct),
            "accuracy_difference_interval_95": paired_accuracy_difference_interval(
                correct, baseline_correct, seed=seed
            ),
            "seconds": baseline.seconds,
        },
        "majority_class_accuracy": float((labels == majority).mean()),
        "truncated_documents": int(tokens.truncated.sum()),
        "data_treatments": [dataclasses.asdict(treatment) for treatment in text.treatments],
        "calibration": json.loads((run.directory / CALIBRATION).read_text(encoding="utf-8")),
        "training": {
            "seconds": seconds,
            "document_tokens": document_tokens,
            "tokens_per_second": document_tokens / seconds if seconds > 0 else None,
            "peak_memory_bytes": max(record.peak_memory_bytes for record in records),
            "cost_usd": None if price is None else price * seconds / 3600,
        },
    }
