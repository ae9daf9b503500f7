"""A run directory as training and evaluation leave it, from simulated scores."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from accel_gpt2.classify import bayes, metrics
from accel_gpt2.classify.calibration import fit_calibration
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.recipe.layers import to_yaml


def write_trained_run(directory: Path, class_names: list[str], *, num_steps: int = 120) -> None:
    """What stands in a run directory when every class is trained and nothing is evaluated."""
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text(
        to_yaml(TrainRecipe(model="gpt2-tiny", init="scratch", dataset="ag_news"))
    )
    (directory / "plan.json").write_text(
        json.dumps({"class_names": class_names, "num_parameters": 1_383_000})
    )
    (directory / "environment.json").write_text(
        json.dumps({"python": "3.12.3", "torch": "2.13.0+cpu", "machine": "2 CPU cores"})
    )
    (directory / "command.txt").write_text(
        "accelerate launch launch/train.py --model gpt2-tiny --dataset ag_news\n"
    )
    rows = [{"event": "start", "seconds": 0.0}]
    for index, name in enumerate(class_names):
        best = np.inf
        for step in range(10, num_steps + 1, 10):
            loss = 4.1 + 0.1 * index + 4.0 * np.exp(-step / 30) + rng.normal(0, 0.03)
            common = {"class_index": index, "class_name": name, "step": step, "epoch": step / 40}
            rows.append(
                {
                    "event": "step",
                    **common,
                    "loss": loss,
                    "learning_rate": 1e-3,
                    "grad_norm": 0.8,
                    "tokens": 4096 * step,
                    "tokens_per_second": 21_000.0,
                    "seconds": step / 5,
                    "peak_memory_bytes": 900_000_000,
                }
            )
            if step % 40 == 0:
                bits = (loss + 0.05) / np.log(2) + (0.8 if step == num_steps else 0.0)
                rows.append(
                    {
                        "event": "evaluate",
                        **common,
                        "validation_bits_per_token": bits,
                        "validation_bits_per_byte": bits / 4.2,
                        "best": bool(bits < best),
                        "joint_validation_accuracy": None,
                    }
                )
                best = min(best, bits)
    (directory / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_evaluation(directory: Path, class_names: list[str], *, num_documents: int = 600) -> dict:
    """evaluation/scores.parquet and metrics.json, from scores with a true class effect."""
    rng = np.random.default_rng(1)
    num_classes = len(class_names)
    labels = np.concatenate(
        [np.arange(num_classes), rng.integers(0, num_classes, num_documents - num_classes)]
    )
    num_tokens = rng.integers(8, 120, num_documents)
    log_likelihoods = -4.4 * num_tokens[:, None] + rng.normal(0, 6, (num_documents, num_classes))
    log_likelihoods[np.arange(num_documents), labels] += 14 + 0.05 * num_tokens
    num_bytes = num_tokens * 4
    log_prior = bayes.log_priors(np.bincount(labels).tolist(), "training")
    calibration = fit_calibration(log_likelihoods, log_prior, num_tokens, labels)
    predictions = bayes.predict(log_likelihoods, log_prior)
    correct = predictions == labels
    baseline_correct = np.where(rng.random(num_documents) < 0.9, correct, ~correct)

    content = {
        "dataset": "ag_news",
        "split": "test",
        "model": "gpt2-tiny",
        "num_documents": num_documents,
        "class_names": class_names,
        **metrics.classification_metrics(
            labels, log_likelihoods, log_prior, calibration, num_tokens, class_names
        ),
        "bits_per_byte": metrics.bits_per_byte_matrix(labels, log_likelihoods, num_bytes).tolist(),
        "bits_per_token": metrics.bits_per_token_matrix(
            labels, log_likelihoods, num_tokens
        ).tolist(),
        "documents_per_second": 812.4,
        "baseline": {
            "name": "TF-IDF + logistic regression",
            "accuracy": float(baseline_correct.mean()),
            "accuracy_interval_95": [0.82, 0.88],
            "macro_f1": float(baseline_correct.mean()) - 0.002,
            "mcnemar": metrics.mcnemar_exact(correct, baseline_correct),
            "accuracy_difference_interval_95": metrics.paired_accuracy_difference_interval(
                correct, baseline_correct
            ),
            "seconds": 3.4,
        },
        "majority_class_accuracy": float(np.bincount(labels).max() / num_documents),
        "truncated_documents": 12,
        "data_treatments": [
            {
                "kind": "duplicate",
                "split": "train",
                "count": 31,
                "example": "row 128: Oil prices rise <b>again</b>",
                "what": "documents that occur in the test split were left out of training",
            }
        ],
        "calibration": calibration.to_json(),
        "training": {
            "seconds": 342.0,
            "document_tokens": 1_966_080,
            "tokens_per_second": 20_500.0,
            "peak_memory_bytes": 900_000_000,
            "cost_usd": None,
        },
    }
    (directory / "evaluation").mkdir()
    (directory / "evaluation" / "metrics.json").write_text(json.dumps(content))
    table = {
        "document": np.arange(num_documents),
        "label": labels,
        "prediction": predictions,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "truncated": np.zeros(num_documents, dtype=bool),
        **{f"log_likelihood_{i}": log_likelihoods[:, i] for i in range(num_classes)},
    }
    pyarrow.parquet.write_table(pyarrow.table(table), directory / "evaluation" / "scores.parquet")
    return content


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """A function that writes a run of the given classes, evaluated or not, and returns its path."""

    def make(class_names: list[str], *, evaluated: bool = True) -> Path:
        directory = tmp_path_factory.mktemp("runs") / f"{len(class_names)} classes"
        write_trained_run(directory, class_names)
        if evaluated:
            write_evaluation(directory, class_names)
        return directory

    return make


@pytest.fixture
def evaluated_run(make_run):
    return make_run(["World", "Sports", "Business"])


@pytest.fixture
def trained_run(make_run):
    return make_run(["World", "Sports", "Business"], evaluated=False)
