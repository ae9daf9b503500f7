"""What lies behind one accuracy: the part of a document that is needed, the documents that are
sure, how far the classes stand apart, and text of another kind.

Shapes and units are those of `metrics`. Every result can be written as JSON.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from accel_gpt2.classify import bayes
from accel_gpt2.classify.bayes import FloatArray
from accel_gpt2.classify.calibration import Calibration, calibrated_log_probabilities

_NUM_COVERAGES = 20
_NUM_LOG_RATIO_BINS = 40
# The few documents beyond these percentiles would stretch the axis; they are counted in end bins.
_LOG_RATIO_PERCENTILES = (0.5, 99.5)


def accuracy_by_tokens_read(
    token_log_likelihoods: Sequence[npt.ArrayLike],
    num_tokens: npt.ArrayLike,
    labels: npt.ArrayLike,
    log_prior: npt.ArrayLike,
) -> list[dict[str, Any]]:
    """Accuracy of Bayes' rule after the first 1, 2, 4, ... predicted tokens of every document.

    `token_log_likelihoods` has one flat array per class, in nats: the tokens of all documents one
    after the other, `num_tokens` [num_documents] of each. Shorter documents count with all that
    they have, and the last point, at the longest document, is the whole text. Each point has
    `tokens`, `accuracy` and `interval_95` (Wilson 1927).

    >>> first, last = accuracy_by_tokens_read(
    ...     [[-1.0, -5.0, -1.0], [-2.0, -1.0, -2.0]], [2, 1], [1, 0], np.log([0.5, 0.5])
    ... )
    >>> first["tokens"], first["accuracy"], last["tokens"], last["accuracy"]
    (1, 0.5, 2, 1.0)
    """
    lengths = np.asarray(num_tokens, dtype=np.int64)
    targets = np.asarray(labels, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    longest = int(lengths.max())
    points = [*(2**i for i in range((longest - 1).bit_length())), longest]
    ends = starts + np.minimum(lengths, np.array(points)[:, None])  # [points, documents]

    log_likelihoods = np.empty((*ends.shape, len(token_log_likelihoods)))
    for index, flat in enumerate(token_log_likelihoods):
        assert np.size(flat) == lengths.sum(), "not one log-likelihood for every token"
        # Sums from the start of the file: float64 keeps 1e-7 nats of 1e8, float32 would not.
        sums = np.concatenate([[0.0], np.cumsum(flat, dtype=np.float64)])
        log_likelihoods[..., index] = sums[ends] - sums[starts]

    curve = []
    for tokens, scores in zip(points, log_likelihoods, strict=True):
        right = int((bayes.predict(scores, log_prior) == targets).sum())
        interval = binomtest(right, len(targets)).proportion_ci(method="wilson")
        curve.append(
            {
                "tokens": tokens,
                "accuracy": right / len(targets),
                "interval_95": [float(interval.low), float(interval.high)],
            }
        )
    return curve


def risk_coverage(labels: npt.ArrayLike, log_probabilities: npt.ArrayLike) -> list[dict[str, Any]]:
    """The error rate when only the surest documents are answered, at 5%, 10%, ... 100% of them.

    `log_probabilities` are normalised, [num_documents, num_classes] in nats, best calibrated ones.
    `coverage` is the share that is answered, `risk` the share of these that is wrong. Documents
    that are equally sure count as if they came in random order.

    >>> log_p = np.log([[0.9, 0.1], [0.6, 0.4]])
    >>> [point["risk"] for point in risk_coverage([0, 1], log_p)][::10]
    [0.0, 0.5]
    """
    risks = _risk_by_documents_answered(labels, log_probabilities)
    points = []
    for twentieths in range(1, _NUM_COVERAGES + 1):
        answered = -(-len(risks) * twentieths // _NUM_COVERAGES)  # rounded up
        points.append({"coverage": twentieths / _NUM_COVERAGES, "risk": float(risks[answered - 1])})
    return points


def _risk_by_documents_answered(
    labels: npt.ArrayLike, log_probabilities: npt.ArrayLike
) -> FloatArray:
    log_p = np.asarray(log_probabilities, dtype=np.float64)
    wrong = log_p.argmax(axis=1) != np.asarray(labels, dtype=np.int64)
    _, group, sizes = np.unique(-_confidence(log_p), return_inverse=True, return_counts=True)
    expected = np.bincount(group, weights=wrong) / sizes  # [groups], the surest first
    risks: FloatArray = np.cumsum(np.repeat(expected, sizes)) / np.arange(1, len(wrong) + 1)
    return risks


def _confidence(log_probabilities: FloatArray) -> FloatArray:
    """Log-odds of the most probable class: ranks as its probability, and does not tie at 1."""
    ascending = np.sort(log_probabilities, axis=1)
    confidence: FloatArray = ascending[:, -1] - logsumexp(ascending[:, :-1], axis=1)
    return confidence


def log_ratio_histograms(
    labels: npt.ArrayLike, scores: npt.ArrayLike, class_names: Sequence[str]
) -> dict[str, Any]:
    """Histograms, one per true class, of its score minus the best other score, in nats.

    `scores` are log p(x|c), or log p(c|x) of a discriminative classifier. Positive is right, if the
    priors do not say otherwise, and 0 is always an edge. The `edges` are common to all classes,
    evenly spaced around all but the most extreme 1% of documents, which fall into the end bins.

    >>> result = log_ratio_histograms([0, 0, 1], [[-1, -3], [-3, -2], [-9, -5]], ["ham", "spam"])
    >>> sum(result["counts"]["ham"]), sum(result["counts"]["spam"])
    (2, 1)
    """
    values = np.asarray(scores, dtype=np.float64)
    targets = np.asarray(labels, dtype=np.int64)
    documents = np.arange(len(targets))
    others = values.copy()
    others[documents, targets] = -np.inf
    ratios = values[documents, targets] - others.max(axis=1)

    low, high = np.percentile(ratios, _LOG_RATIO_PERCENTILES)
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / _NUM_LOG_RATIO_BINS or 1.0
    first, last = np.floor(low / width), np.ceil(high / width)
    edges = width * np.arange(first, max(last, first + 1) + 1)
    shown = np.clip(ratios, edges[0], edges[-1])
    return {
        "edges": edges.tolist(),
        "counts": {
            name: np.histogram(shown[targets == index], edges)[0].tolist()
            for index, name in enumerate(class_names)
        },
    }


def out_of_distribution_aurocs(
    log_likelihoods: npt.ArrayLike,
    num_tokens: npt.ArrayLike,
    other_log_likelihoods: npt.ArrayLike,
    other_num_tokens: npt.ArrayLike,
    log_prior: npt.ArrayLike,
    calibration: Calibration,
    *,
    posteriors_only: bool = False,
) -> dict[str, Any]:
    """How well three scores tell the documents of a test split from those of another data set.

    Each is the area under the ROC curve, 1 where every document of the test split scores higher:
    `auroc` of log sum_c p(x|c)·p(c), `auroc_per_token` of the same per predicted token, because
    longer text is less probable whatever it says, and `auroc_max_probability` of the highest
    calibrated probability. The density tells another background (other words, another form)
    rather than another meaning: Arora et al. 2021 (arXiv:2109.06827).

    Args:
        log_likelihoods, num_tokens: [num_documents, num_classes] in nats and [num_documents].
        posteriors_only: for a discriminative classifier, whose log p(c|x) say nothing about p(x):
            the first two are None.
    """
    inside = _scores(log_likelihoods, num_tokens, log_prior, calibration)
    outside = _scores(other_log_likelihoods, other_num_tokens, log_prior, calibration)
    is_inside = np.repeat([1, 0], [inside.shape[1], outside.shape[1]])
    density, per_token, confidence = (
        float(roc_auc_score(is_inside, both)) for both in np.concatenate([inside, outside], axis=1)
    )
    return {
        "num_documents": outside.shape[1],
        "auroc": None if posteriors_only else density,
        "auroc_per_token": None if posteriors_only else per_token,
        "auroc_max_probability": confidence,
    }


def _scores(
    log_likelihoods: npt.ArrayLike,
    num_tokens: npt.ArrayLike,
    log_prior: npt.ArrayLike,
    calibration: Calibration,
) -> FloatArray:
    """Density, density per token and confidence, [3, num_documents]."""
    density = logsumexp(bayes.joint_log_probabilities(log_likelihoods, log_prior), axis=1)
    log_p = calibrated_log_probabilities(calibration, log_likelihoods, log_prior, num_tokens)
    return np.stack([density, density / np.asarray(num_tokens), _confidence(log_p)])
