"""What an evaluation reports: accuracy with its uncertainty, calibration, comparison with others.

`labels` are class indices, [num_documents]; log-likelihoods are [num_documents, num_classes] in
nats, summed over a document's predicted tokens. Every dictionary can be written as JSON.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

from accel_gpt2.classify import bayes
from accel_gpt2.classify.bayes import FloatArray, IntArray
from accel_gpt2.classify.calibration import Calibration, calibrated_log_probabilities

NUM_RELIABILITY_BINS = 15


def classification_metrics(
    labels: npt.ArrayLike,
    log_likelihoods: npt.ArrayLike,
    log_prior: npt.ArrayLike,
    calibration: Calibration,
    num_tokens: npt.ArrayLike,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    num_bootstrap: int = 10_000,
) -> dict[str, Any]:
    """Everything about the predictions on one split.

    `accuracy`, `macro_f1`, `precision`, `recall`, `f1` and `confusion_matrix` (rows: true class,
    columns: predicted) belong to Bayes' rule without calibration; `raw` and `calibrated` hold what
    depends on the probabilities (see `probability_metrics`). A class that is never predicted has
    precision 0, and one without documents recall 0. Intervals are 95% percentile bootstrap over
    documents.
    """
    targets = np.asarray(labels, dtype=np.int64)
    joint = bayes.joint_log_probabilities(log_likelihoods, log_prior)
    predictions = bayes.predict(log_likelihoods, log_prior)
    raw = joint - logsumexp(joint, axis=1, keepdims=True)
    calibrated = calibrated_log_probabilities(calibration, log_likelihoods, log_prior, num_tokens)

    confusion = confusion_matrix(targets, predictions, labels=range(len(class_names)))
    precision, recall, f1, _ = precision_recall_fscore_support(
        targets, predictions, labels=range(len(class_names)), zero_division=0
    )
    accuracy_interval, macro_f1_interval = _bootstrap_intervals(
        confusion, seed=seed, num_bootstrap=num_bootstrap
    )
    return {
        "accuracy": float(np.mean(predictions == targets)),
        "accuracy_interval_95": accuracy_interval,
        "macro_f1": float(np.mean(f1)),
        "macro_f1_interval_95": macro_f1_interval,
        "precision": dict(zip(class_names, precision.tolist(), strict=True)),
        "recall": dict(zip(class_names, recall.tolist(), strict=True)),
        "f1": dict(zip(class_names, f1.tolist(), strict=True)),
        "confusion_matrix": confusion.tolist(),
        "raw": probability_metrics(targets, raw),
        "calibrated": probability_metrics(targets, calibrated),
    }


def probability_metrics(labels: npt.ArrayLike, log_probabilities: npt.ArrayLike) -> dict[str, Any]:
    """How good normalised log-probabilities, [num_documents, num_classes] in nats, are.

    `nll` is the mean negative log-probability of the label in nats; `brier` the mean over documents
    of the squared error summed over classes, between 0 and 2; `ece` the expected calibration error
    of the most probable class over 15 bins of equal width, and `reliability` these bins; `auroc`
    the mean of the one-against-rest areas of the classes, None when only one class occurs.
    """
    targets = np.asarray(labels, dtype=np.int64)
    log_p = np.asarray(log_probabilities, dtype=np.float64)
    probabilities = np.exp(log_p)
    one_hot = np.eye(log_p.shape[1])[targets]
    reliability = _reliability_bins(targets, probabilities)
    return {
        "accuracy": float(np.mean(log_p.argmax(axis=1) == targets)),
        "nll": -float(log_p[np.arange(len(targets)), targets].mean()),
        "brier": float(((probabilities - one_hot) ** 2).sum(axis=1).mean()),
        "ece": _expected_calibration_error(reliability),
        "auroc": _macro_auroc(targets, log_p),
        "reliability": reliability,
    }


def _reliability_bins(targets: IntArray, probabilities: FloatArray) -> list[dict[str, Any]]:
    """Bins (lower, upper] of the highest probability; empty ones have None for both means."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == targets
    edges = np.linspace(0.0, 1.0, NUM_RELIABILITY_BINS + 1)
    # Rounding can leave a highest probability a hair above 1.
    index = np.digitize(np.minimum(confidence, 1.0), edges, right=True) - 1
    counts = np.bincount(index, minlength=NUM_RELIABILITY_BINS)
    confidence_sums = np.bincount(index, weights=confidence, minlength=NUM_RELIABILITY_BINS)
    correct_sums = np.bincount(index, weights=correct, minlength=NUM_RELIABILITY_BINS)
    return [
        {
            "lower": float(edges[i]),
            "upper": float(edges[i + 1]),
            "count": int(counts[i]),
            "mean_confidence": float(confidence_sums[i] / counts[i]) if counts[i] else None,
            "accuracy": float(correct_sums[i] / counts[i]) if counts[i] else None,
        }
        for i in range(NUM_RELIABILITY_BINS)
    ]


def _expected_calibration_error(reliability: Sequence[dict[str, Any]]) -> float:
    """Guo et al. 2017, equation 3: the gap of each bin, weighted by its documents."""
    filled = [row for row in reliability if row["count"]]
    gaps = [row["count"] * abs(row["accuracy"] - row["mean_confidence"]) for row in filled]
    return float(sum(gaps) / sum(row["count"] for row in filled))


def _macro_auroc(targets: IntArray, log_probabilities: FloatArray) -> float | None:
    areas = []
    for class_index in range(log_probabilities.shape[1]):
        positive = targets == class_index
        if positive.all() or not positive.any():
            continue
        # Log-odds rank as the probability does, and do not tie where it rounds to 0 or 1.
        rest = logsumexp(np.delete(log_probabilities, class_index, axis=1), axis=1)
        areas.append(roc_auc_score(positive, log_probabilities[:, class_index] - rest))
    return float(np.mean(areas)) if areas else None


def _bootstrap_intervals(
    confusion: IntArray, *, seed: int, num_bootstrap: int
) -> tuple[list[float], list[float]]:
    """95% intervals of accuracy and macro-F1.

    Documents drawn with replacement fill the confusion matrix as one multinomial draw, so the
    matrix is drawn and not the documents.
    """
    num_documents = confusion.sum()
    draws = np.random.default_rng(seed).multinomial(
        num_documents, confusion.ravel() / num_documents, size=num_bootstrap
    )
    matrices = draws.reshape(num_bootstrap, *confusion.shape)
    hits = np.diagonal(matrices, axis1=1, axis2=2)
    # F1 = 2·TP / (true documents + predicted documents), 0 where there are neither.
    rows_and_columns = matrices.sum(axis=1) + matrices.sum(axis=2)
    f1 = 2 * hits / np.maximum(rows_and_columns, 1)
    return (
        _percentile_interval(hits.sum(axis=1) / num_documents),
        _percentile_interval(f1.mean(axis=1)),
    )


def _percentile_interval(draws: FloatArray) -> list[float]:
    return [float(bound) for bound in np.percentile(draws, [2.5, 97.5])]


def bits_per_byte_matrix(
    labels: npt.ArrayLike, log_likelihoods: npt.ArrayLike, num_bytes: npt.ArrayLike
) -> FloatArray:
    """Bits per byte, [true class, model's class]: documents of the row under the column's model.

    All bits of a class's documents over all their UTF-8 bytes, so it does not depend on the
    tokenizer. The row of a class without documents is NaN.

    >>> bits = np.log(2) * np.array([[-8.0, -16.0], [-24.0, -8.0]])
    >>> bits_per_byte_matrix([0, 1], bits, [4, 8]).round(6).tolist()
    [[2.0, 4.0], [3.0, 1.0]]
    """
    return _bits_per_unit_matrix(labels, log_likelihoods, num_bytes)


def bits_per_token_matrix(
    labels: npt.ArrayLike, log_likelihoods: npt.ArrayLike, num_tokens: npt.ArrayLike
) -> FloatArray:
    """Bits per predicted token, otherwise as `bits_per_byte_matrix`."""
    return _bits_per_unit_matrix(labels, log_likelihoods, num_tokens)


def _bits_per_unit_matrix(
    labels: npt.ArrayLike, log_likelihoods: npt.ArrayLike, num_units: npt.ArrayLike
) -> FloatArray:
    targets = np.asarray(labels, dtype=np.int64)
    bits = -np.asarray(log_likelihoods, dtype=np.float64) / np.log(2)
    units = np.asarray(num_units, dtype=np.float64)
    membership = np.eye(bits.shape[1])[targets].T  # [class, document]
    with np.errstate(invalid="ignore"):
        return np.asarray(membership @ bits / (membership @ units)[:, None], dtype=np.float64)


def mcnemar_exact(correct_a: npt.ArrayLike, correct_b: npt.ArrayLike) -> dict[str, Any]:
    """McNemar's exact two-sided test that two classifiers are right equally often.

    `correct_a` and `correct_b` say for the same documents which of them each gets right; only the
    documents on which they differ count, `only_a` and `only_b`.

    >>> result = mcnemar_exact([True] * 6 + [False], [False] * 5 + [True, True])
    >>> result["only_a"], result["only_b"], round(result["p_value"], 5)
    (5, 1, 0.21875)
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    differing = only_a + only_b
    p_value = float(binomtest(only_a, differing, 0.5).pvalue) if differing else 1.0
    return {"p_value": p_value, "only_a": only_a, "only_b": only_b}


def paired_accuracy_difference_interval(
    correct_a: npt.ArrayLike,
    correct_b: npt.ArrayLike,
    seed: int = 0,
    *,
    num_bootstrap: int = 10_000,
) -> list[float]:
    """95% percentile bootstrap interval of accuracy(a) - accuracy(b) on the same documents."""
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    counts = np.array([np.sum(a & ~b), np.sum(b & ~a), np.sum(a == b)])
    # Documents drawn with replacement fill these three counts as one multinomial draw.
    draws = np.random.default_rng(seed).multinomial(len(a), counts / len(a), size=num_bootstrap)
    return _percentile_interval((draws[:, 0] - draws[:, 1]) / len(a))
