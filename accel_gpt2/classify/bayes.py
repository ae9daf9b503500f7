"""Bayes' rule on log-likelihoods: argmax over c of log p(x|c) + log p(c).

Log-likelihoods are float64 arrays [num_documents, num_classes] in nats, each the SUM over a
document's predicted tokens, EOS included. Priors and posteriors need the sum: a softmax over
per-token means answers 50-55% whatever the text.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from accel_gpt2.errors import UserError
from accel_gpt2.recipe import Priors

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def log_priors(class_counts: Sequence[int], priors: Priors) -> FloatArray:
    """log p(c) in nats, [num_classes], from the number of training documents of each class.

    Raises:
        UserError: when the prior is asked of the training counts and a class has no document.

    >>> np.exp(log_priors([30, 10], "training")).round(6).tolist()
    [0.75, 0.25]
    >>> np.exp(log_priors([30, 10], "uniform")).round(6).tolist()
    [0.5, 0.5]
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    if priors == "uniform":
        return np.full(counts.shape, -np.log(counts.size))
    if counts.min() <= 0:
        raise UserError(
            f"Class {int(counts.argmin())} has no training document, so its prior would be zero; "
            "give every class a document, or use --set priors=uniform."
        )
    logs: FloatArray = np.log(counts) - np.log(counts.sum())
    return logs


def joint_log_probabilities(log_likelihoods: npt.ArrayLike, log_prior: npt.ArrayLike) -> FloatArray:
    """log p(x|c) + log p(c) in nats, [num_documents, num_classes].

    Raises:
        UserError: when a log-likelihood is not finite, which is what a diverged model gives.
    """
    likelihoods = np.asarray(log_likelihoods, dtype=np.float64)
    broken = np.argwhere(~np.isfinite(likelihoods))
    if len(broken):
        document, class_index = broken[0]
        raise UserError(
            f"{len(broken)} log-likelihoods are not finite, the first for document {document} "
            f"under the model of class {class_index}: that model has diverged; train it again "
            "with a lower --learning-rate."
        )
    return likelihoods + np.asarray(log_prior, dtype=np.float64)


def predict(log_likelihoods: npt.ArrayLike, log_prior: npt.ArrayLike) -> IntArray:
    """The most probable class of each document, [num_documents]; ties go to the lowest index.

    >>> predict([[-10.0, -9.0], [-5.0, -5.0]], np.log([0.5, 0.5])).tolist()
    [1, 0]
    """
    classes: IntArray = joint_log_probabilities(log_likelihoods, log_prior).argmax(axis=1)
    return classes.astype(np.int64)


def posteriors(joint_log_probabilities: npt.ArrayLike) -> FloatArray:
    """p(c|x), [num_documents, num_classes], from finite joint log-probabilities; rows sum to 1.

    >>> posteriors([[-1000.0, -1000.0], [0.0, -5000.0]]).tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    """
    probabilities: FloatArray = softmax(
        np.asarray(joint_log_probabilities, dtype=np.float64), axis=1
    )
    return probabilities
