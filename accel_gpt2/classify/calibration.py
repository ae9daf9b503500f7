"""Calibrated probabilities: log p(c|x) = a·log p(x|c) + log p(c) + b_c·T + g_c, normalised.

Summed log-likelihoods count correlated tokens as independent evidence, so raw posteriors are far
too sure. The inverse temperature a takes that back; the length slope b_c and the class bias g_c
take out that one class's model is a little better on every token or on every document. T is the
document's number of predicted tokens. Temperature and bias are those of Guo et al. 2017
(arXiv:1706.04599, temperature and vector scaling); the length slope is the generative classifier's
own need.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from annotated_types import Gt
from pydantic import TypeAdapter
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax

from accel_gpt2.classify.bayes import FloatArray, joint_log_probabilities
from accel_gpt2.errors import UserError
from accel_gpt2.train.manifest import read_json

# One standard deviation of a Gaussian prior around "no calibration", so that ten validation
# documents cannot move the probabilities far and separable data cannot send them to infinity. With
# n documents the penalty on the mean loss falls as 1/n: at a thousand it is no longer felt.
_LOG_SCALE_DEVIATION = 3.0  # a between 1/20 and 20 is ordinary: long documents want about 0.05
_SLOPE_DEVIATION = 1.0  # nats of log-odds for one standard deviation of length
_BIAS_DEVIATION = 1.0  # nats of log-odds
_LOG_SCALE_BOUNDS = (-15.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """`scale` is the inverse temperature a; `length_slope` is b_c in nats per token, `bias` g_c in
    nats, one each per class, both centred on zero."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True, "allow_inf_nan": False}

    scale: Annotated[float, Gt(0)]
    length_slope: tuple[float, ...]
    bias: tuple[float, ...]

    @classmethod
    def identity(cls, num_classes: int) -> "Calibration":
        """The calibration that changes nothing.

        >>> Calibration.identity(2)
        Calibration(scale=1.0, length_slope=(0.0, 0.0), bias=(0.0, 0.0))
        """
        zeros = (0.0,) * num_classes
        return cls(scale=1.0, length_slope=zeros, bias=zeros)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `read` reads back to an equal calibration."""
        return {
            "scale": self.scale,
            "length_slope": list(self.length_slope),
            "bias": list(self.bias),
        }

    @classmethod
    def read(cls, path: Path, num_classes: int) -> "Calibration":
        """What stands in a file with the keys of `to_json`; other keys are left alone.

        Raises:
            UserError: when it is no calibration of so many classes.
        """
        calibration = read_json(_READER, path)
        if not len(calibration.length_slope) == len(calibration.bias) == num_classes:
            raise UserError(
                f"{path} is not for {num_classes} classes: remove it and start the training again, "
                "which only fits it anew."
            )
        return calibration


_READER = TypeAdapter(Calibration)


def calibrated_log_probabilities(
    calibration: Calibration,
    log_likelihoods: npt.ArrayLike,
    log_prior: npt.ArrayLike,
    num_tokens: npt.ArrayLike,
) -> FloatArray:
    """Normalised log p(c|x) in nats, [num_documents, num_classes].

    `num_tokens`, [num_documents], counts predicted tokens, as the log-likelihoods do.

    >>> fair = Calibration.identity(2)
    >>> log_p = calibrated_log_probabilities(fair, [[-3.0, -3.0]], np.log([0.75, 0.25]), [2])
    >>> np.exp(log_p).round(6).tolist()
    [[0.75, 0.25]]
    """
    # Through the check for finite values that every reader of log-likelihoods needs.
    likelihoods = joint_log_probabilities(log_likelihoods, 0.0)
    lengths = np.asarray(num_tokens, dtype=np.float64)[:, None]
    logits = (
        calibration.scale * likelihoods
        + np.asarray(log_prior, dtype=np.float64)
        + np.asarray(calibration.length_slope) * lengths
        + np.asarray(calibration.bias)
    )
    return np.asarray(log_softmax(logits, axis=1), dtype=np.float64)


def fit_calibration(
    log_likelihoods: npt.ArrayLike,
    log_prior: npt.ArrayLike,
    num_tokens: npt.ArrayLike,
    labels: npt.ArrayLike,
) -> Calibration:
    """Fit a, b and g on held-out documents by penalised maximum likelihood.

    Minimises the mean negative log-likelihood of the labels, with a small ridge towards no
    calibration, first over a alone and then over everything. On the documents it is fitted on the
    result is never worse than the raw posteriors: what is worse falls back to a alone, then to
    none. Documents of one constant length get no length slope.
    """
    likelihoods = joint_log_probabilities(log_likelihoods, 0.0)
    prior = np.asarray(log_prior, dtype=np.float64)
    lengths = np.asarray(num_tokens, dtype=np.float64)
    targets = np.asarray(labels, dtype=np.int64)
    num_documents, num_classes = likelihoods.shape
    assert num_documents > 0, "a calibration needs documents to be fitted on"
    documents = np.arange(num_documents)

    # A constant per document changes no probability; without it the numbers are small.
    centred = likelihoods - likelihoods.mean(axis=1, keepdims=True)
    mean_length, length_deviation = lengths.mean(), lengths.std()
    standard_lengths = (
        (lengths - mean_length) / length_deviation if length_deviation else np.zeros(num_documents)
    )

    def loss_and_gradient(parameters: FloatArray) -> tuple[float, FloatArray]:
        """Parameters: log a, then b per standard deviation of length, then g at mean length."""
        log_scale, slope, bias = np.split(parameters, [1, 1 + num_classes])
        scaled = np.exp(log_scale) * centred
        log_p = log_softmax(scaled + prior + np.outer(standard_lengths, slope) + bias, axis=1)
        residual = np.exp(log_p)
        residual[documents, targets] -= 1.0
        gradient = np.concatenate(
            [
                [(residual * scaled).sum()],
                standard_lengths @ residual,
                residual.sum(axis=0),
            ]
        )
        loss = (
            -log_p[documents, targets].sum()
            + 0.5 * (log_scale.item() / _LOG_SCALE_DEVIATION) ** 2
            + 0.5 * np.sum((slope / _SLOPE_DEVIATION) ** 2)
            + 0.5 * np.sum((bias / _BIAS_DEVIATION) ** 2)
        )
        gradient += np.concatenate(
            [
                log_scale / _LOG_SCALE_DEVIATION**2,
                slope / _SLOPE_DEVIATION**2,
                bias / _BIAS_DEVIATION**2,
            ]
        )
        return float(loss) / num_documents, gradient / num_documents

    def calibration(parameters: FloatArray) -> Calibration:
        log_scale, slope, bias = np.split(parameters, [1, 1 + num_classes])
        # Both are centred as they are: residuals sum to zero over classes, so the search, which
        # begins at zero, never leaves the centred parameters.
        slope_per_token = slope / length_deviation if length_deviation else np.zeros(num_classes)
        bias_at_zero = bias - slope_per_token * mean_length
        return Calibration(
            scale=float(np.exp(log_scale.item())),
            length_slope=tuple(slope_per_token.tolist()),
            bias=tuple(bias_at_zero.tolist()),
        )

    def mean_loss(candidate: Calibration) -> float:
        log_p = calibrated_log_probabilities(candidate, likelihoods, prior, lengths)
        return -float(log_p[documents, targets].mean())

    neutral = np.zeros(1 + 2 * num_classes)
    scale_only = neutral.copy()
    scale_only[0] = minimize_scalar(
        lambda log_scale: loss_and_gradient(np.concatenate([[log_scale], neutral[1:]]))[0],
        bounds=_LOG_SCALE_BOUNDS,
        method="bounded",
        options={"xatol": 1e-6},
    ).x
    everything = minimize(
        loss_and_gradient,
        scale_only,
        jac=True,
        method="L-BFGS-B",
        bounds=[_LOG_SCALE_BOUNDS] + [(None, None)] * (2 * num_classes),
        options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-8},
    ).x

    none = Calibration.identity(num_classes)
    raw_loss = mean_loss(none)
    for candidate in (calibration(everything), calibration(scale_only)):
        if mean_loss(candidate) <= raw_loss:
            return candidate
    return none
