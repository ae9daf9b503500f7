"""What the runs of a comparison have come to, as one document: comparison.json.

It is composed anew from the run directories after each of them, so it says at any moment what is
known. Entries are compared on the test documents of their first seed; the other seeds tell how much
of a difference is the luck of a training.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accel_gpt2.catalog.arms import ArmSpec
from accel_gpt2.classify.alarms import Judged, count_shared_documents, find_alarms
from accel_gpt2.classify.curves import log_ratio_histograms, risk_coverage
from accel_gpt2.classify.describe import describe_environment
from accel_gpt2.classify.entry_scores import EntryScores, read_scores, tokens_read
from accel_gpt2.classify.evaluations import read_metrics, read_out_of_distribution
from accel_gpt2.classify.statistics import accuracy_over_seeds, compare_pairs
from accel_gpt2.classify.untrained import read_compared_data
from accel_gpt2.classify.verdict import verdict_sentences
from accel_gpt2.durable import write_json
from accel_gpt2.errors import UserError
from accel_gpt2.plan.comparison import PlannedRun
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.recipe.layers import read_layer

COMPARISON = "comparison.json"
_FORMAT_VERSION = 1

# Of an entry's metrics.json; the rest repeats what the comparison says once, or is large.
_METRICS = (
    "accuracy",
    "accuracy_interval_95",
    "macro_f1",
    "macro_f1_interval_95",
    "precision",
    "recall",
    "f1",
    "confusion_matrix",
    "raw",
    "calibrated",
    "bits_per_byte",
    "documents_per_second",
    "scoring_seconds",
    "truncated_documents",
    "training",
    "majority_class_accuracy",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared: fixed when it starts.

    `recipe` is the one of arm 3 and `data` what the splits hold; `command` is what was typed.
    `other_dataset` is what the entries should notice to be no text of theirs.
    """

    directory: Path
    runs: tuple[PlannedRun, ...]
    recipe: TrainRecipe
    encoder: str
    command: str
    data: Mapping[str, Any]
    other_dataset: str | None = None

    @property
    def arms(self) -> tuple[ArmSpec, ...]:
        """The entries, in the order of the runs that stand for them."""
        return tuple(arm for run in self.runs if run.is_main for arm in run.arms)

    def path(self, run: PlannedRun) -> Path:
        """The directory of one of the runs."""
        return self.directory / run.directory

    def words(self, arm: ArmSpec, text: str) -> str:
        """An entry's name or description, with the model in it."""
        model = self.encoder if arm.backbone == "encoder" else self.recipe.model
        return text.format(model=Path(model).name)


def describe_data(recipe: TrainRecipe, *, progress: bool = False) -> dict[str, Any]:
    """What comparison.json says about the documents, which are the same for all entries.

    The test split does not depend on the recipe's seed; validation and training documents do, and
    are those of the recipe given.

    Raises:
        UserError: when the data or the tokenizer cannot be had.
    """
    data = read_compared_data(recipe, progress=progress)
    return {
        "dataset": recipe.dataset,
        "split": recipe.test_split,
        "num_documents": len(data.test),
        "class_names": list(data.text.class_names),
        "class_counts": data.class_counts,
        "max_length": recipe.max_length,
        "truncated_documents": int(data.test.truncated.sum()),
        "shared_documents": count_shared_documents(
            data.text.train["text"][:], data.text.test["text"][:]
        ),
        "data_treatments": [dataclasses.asdict(x) for x in data.text.treatments],
    }


def write_comparison(comparison: Comparison, *, missing: Mapping[str, str]) -> dict[str, Any]:
    """Compose comparison.json from the runs that are evaluated, write it, and return it.

    Args:
        missing: why a run that is not evaluated is not, by its directory.

    Raises:
        UserError: when what a run left cannot be read, or was made from other documents.
    """
    scored = {}
    for run in comparison.runs:
        for arm in run.arms:
            if run.is_main and read_metrics(comparison.path(run), arm) is not None:
                scored[arm.id] = read_scores(comparison.path(run), arm)
                _check_documents(scored[arm.id], comparison, run)
    entries = [_entry(comparison, arm, scored.get(arm.id), missing) for arm in comparison.arms]
    pairs = compare_pairs({arm_id: x.predictions == x.labels for arm_id, x in scored.items()})
    document = {
        "format_version": _FORMAT_VERSION,
        **comparison.data,
        "seeds": sorted({run.seed for run in comparison.runs}),
        "command": comparison.command,
        "date": time.strftime("%Y-%m-%d"),
        "environment": describe_environment(),
        "verdict": verdict_sentences(entries, pairs),
        "entries": entries,
        "pairs": pairs,
        "alarms": _alarms(comparison, scored),
    }
    write_json(comparison.directory / COMPARISON, document)
    return document


def _alarms(comparison: Comparison, scored: Mapping[str, EntryScores]) -> list[dict[str, Any]]:
    if not scored:
        return []
    judged = [
        Judged(
            id=arm.id,
            name=comparison.words(arm, arm.name),
            kind=arm.kind,
            predictions=scored[arm.id].predictions,
            metrics=read_metrics(comparison.path(run), arm) or {},
            independent_masks=arm.pll == "independent",
        )
        for run in comparison.runs
        for arm in run.arms
        if run.is_main and arm.id in scored
    ]
    return find_alarms(
        judged,
        labels=next(iter(scored.values())).labels,
        class_names=comparison.data["class_names"],
        num_shared_documents=comparison.data["shared_documents"],
    )


def _check_documents(scores: EntryScores, comparison: Comparison, run: PlannedRun) -> None:
    counts = comparison.data["class_counts"]["test"]
    if np.bincount(scores.labels, minlength=len(counts)).tolist() != counts:
        raise UserError(
            f"{comparison.path(run)} was evaluated on other test documents than today's "
            f"{comparison.recipe.dataset} has: bring the earlier data back, or give another "
            "--output-dir."
        )


def _entry(
    comparison: Comparison, arm: ArmSpec, scores: EntryScores | None, missing: Mapping[str, str]
) -> dict[str, Any]:
    runs = [run for run in comparison.runs if arm in run.arms]
    full = [run for run in runs if run.documents_per_class is None]
    first = next(run for run in full if run.is_main)
    metrics = read_metrics(comparison.path(first), arm)
    done = metrics is not None
    return {
        "id": arm.id,
        "arm": arm.arm,
        "name": comparison.words(arm, arm.name),
        "kind": arm.kind,
        "description": comparison.words(arm, arm.description),
        "status": "done" if done else "missing",
        "why_missing": None if done else missing.get(first.directory, "It has not been run yet."),
        "directories": [run.directory for run in full],
        "recipe": _recipe(comparison.path(first)) if done and arm.trained else None,
        "metrics": None if metrics is None else {key: metrics.get(key) for key in _METRICS},
        "by_seed": _by_seed(comparison, arm, full) if done else None,
        "curves": {
            "training_documents": _training_documents(comparison, arm, runs),
            "tokens_read": None if scores is None else tokens_read(scores),
            "risk_coverage": None
            if scores is None
            else risk_coverage(scores.labels, scores.log_probabilities),
        },
        "log_ratios": None
        if scores is None
        else log_ratio_histograms(scores.labels, scores.scores, comparison.data["class_names"]),
        "out_of_distribution": (
            read_out_of_distribution(comparison.path(first), arm, comparison.other_dataset)
            if done and comparison.other_dataset
            else None
        ),
    }


def _recipe(run_directory: Path) -> dict[str, Any]:
    return dict(read_layer(run_directory / "recipe.yaml").values)


def _by_seed(comparison: Comparison, arm: ArmSpec, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """What each seed's full run has come to, and how far another seed, or other test documents,
    would have moved it."""
    known = [
        (run, metrics)
        for run in runs
        if (metrics := read_metrics(comparison.path(run), arm)) is not None
    ]
    scores = [read_scores(comparison.path(run), arm) for run, _ in known]
    return {
        "seeds": [run.seed for run, _ in known],
        **accuracy_over_seeds([x.predictions == x.labels for x in scores]),
        "macro_f1": [metrics["macro_f1"] for _, metrics in known],
        "nll": [metrics["calibrated"]["nll"] for _, metrics in known],
    }


def _training_documents(
    comparison: Comparison, arm: ArmSpec, runs: Sequence[PlannedRun]
) -> list[dict[str, Any]] | None:
    """The learning curve, fewest documents first; the full run is its last point."""
    if all(run.documents_per_class is None for run in runs):
        return None
    everything = max(comparison.data["class_counts"]["train"])
    points: dict[int, list[float]] = {}
    for run in runs:
        metrics = read_metrics(comparison.path(run), arm)
        if metrics is not None:
            documents = run.documents_per_class or everything
            points.setdefault(documents, []).append(metrics["accuracy"])
    return [
        {"documents_per_class": documents, "accuracy": accuracies}
        for documents, accuracies in sorted(points.items())
    ]
