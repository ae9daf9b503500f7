"""Calibration fitted on held-out documents."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from accel_gpt2.classify.calibration import (
    Calibration,
    calibrated_log_probabilities,
    fit_calibration,
)


def mean_nll(calibration, log_likelihoods, log_prior, num_tokens, labels):
    log_p = calibrated_log_probabilities(calibration, log_likelihoods, log_prior, num_tokens)
    return -log_p[np.arange(len(labels)), labels].mean()


def simulated_scores(
    *, num_documents, num_classes, scale, slope, bias, seed, shortest=2, longest=1024
):
    """Scores whose labels truly follow softmax(scale·logp + prior + slope·T + bias)."""
    rng = np.random.default_rng(seed)
    num_tokens = rng.integers(shortest, longest + 1, size=num_documents)
    log_likelihoods = -5.0 * num_tokens[:, None] + rng.normal(
        scale=2.0 / scale, size=(num_documents, num_classes)
    )
    log_prior = np.log(rng.dirichlet(np.full(num_classes, 20.0)))
    logits = scale * log_likelihoods + log_prior + np.outer(num_tokens, slope) + bias
    gumbel = rng.gumbel(size=logits.shape)
    return log_likelihoods, log_prior, num_tokens, (logits + gumbel).argmax(axis=1)


def test_recovers_what_made_the_labels():
    """Labels drawn from known parameters give these parameters back within sampling error."""
    slope, bias = np.array([0.004, -0.001, -0.003]), np.array([-0.8, 0.5, 0.3])
    scores = simulated_scores(
        num_documents=20_000, num_classes=3, scale=0.05, slope=slope, bias=bias, seed=1
    )
    fitted = fit_calibration(*scores)
    assert fitted.scale == pytest.approx(0.05, rel=0.05)
    np.testing.assert_allclose(fitted.length_slope, slope, atol=4e-4)
    np.testing.assert_allclose(fitted.bias, bias, atol=0.15)


def test_two_classes_equal_logistic_regression():
    """For two classes and many documents it is a logistic regression on (margin, length)."""
    log_likelihoods, _, num_tokens, labels = simulated_scores(
        num_documents=5000,
        num_classes=2,
        scale=0.1,
        slope=np.array([-0.002, 0.002]),
        bias=np.array([0.6, -0.6]),
        seed=2,
    )
    log_prior = np.log([0.5, 0.5])
    fitted = fit_calibration(log_likelihoods, log_prior, num_tokens, labels)
    ours = np.exp(calibrated_log_probabilities(fitted, log_likelihoods, log_prior, num_tokens))

    margin = (log_likelihoods[:, 1] - log_likelihoods[:, 0]) / 10
    features = np.column_stack([margin, num_tokens / 500])
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(features, labels)
    np.testing.assert_allclose(ours, reference.predict_proba(features), atol=2e-3)


@settings(max_examples=60, deadline=None)
@given(
    num_documents=st.integers(1, 60),
    num_classes=st.integers(2, 20),
    scale=st.sampled_from([0.01, 0.2, 1.0, 5.0]),
    lengths=st.sampled_from([(2, 1024), (2, 3), (40, 40)]),
    seed=st.integers(0, 2**31),
)
def test_never_worse_than_raw_where_it_was_fitted(num_documents, num_classes, scale, lengths, seed):
    """Small samples, many classes, constant lengths: the loss never rises and nothing overflows."""
    zeros = np.zeros(num_classes)
    scores = simulated_scores(
        num_documents=num_documents,
        num_classes=num_classes,
        scale=scale,
        slope=zeros,
        bias=zeros,
        seed=seed,
        shortest=lengths[0],
        longest=lengths[1],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = fit_calibration(*scores)
        fitted_nll = mean_nll(fitted, *scores)
    assert fitted_nll <= mean_nll(Calibration.identity(num_classes), *scores)
    assert fitted.scale > 0
    assert np.isfinite([fitted.scale, *fitted.length_slope, *fitted.bias]).all()
    assert sum(fitted.length_slope) == pytest.approx(0.0, abs=1e-9)
    assert sum(fitted.bias) == pytest.approx(0.0, abs=1e-9)


def test_random_scores_end_at_the_prior():
    """Scores that say nothing about the label lose their influence: a large gain over raw."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, size=2000)
    log_likelihoods = rng.normal(-800.0, 60.0, size=(2000, 4))
    num_tokens = rng.integers(50, 300, size=2000)
    log_prior = np.log(np.full(4, 0.25))
    fitted = fit_calibration(log_likelihoods, log_prior, num_tokens, labels)
    assert fitted.scale < 0.01
    nll = mean_nll(fitted, log_likelihoods, log_prior, num_tokens, labels)
    assert nll == pytest.approx(np.log(4), abs=0.01)


@pytest.mark.parametrize("margin", [0.01, 1.0, 300.0])
def test_separable_documents_stay_bounded(margin):
    """Ten perfectly separated documents do not send the scale to its bound."""
    labels = np.arange(10) % 2
    log_likelihoods = np.where(np.eye(2)[labels] > 0, -100.0, -100.0 - margin)
    fitted = fit_calibration(log_likelihoods, np.log([0.5, 0.5]), np.full(10, 30), labels)
    assert 1.0 <= fitted.scale < 2000.0
    assert fitted.length_slope == (0.0, 0.0)
    np.testing.assert_allclose(fitted.bias, 0.0, atol=1e-6)


def test_a_class_missing_from_validation_keeps_some_probability():
    """Ten documents without one of three classes do not rule this class out for ever."""
    rng = np.random.default_rng(4)
    labels = np.arange(10) % 2
    log_likelihoods = rng.normal(-60.0, 0.5, size=(10, 3))
    log_prior = np.log(np.full(3, 1 / 3))
    fitted = fit_calibration(log_likelihoods, log_prior, rng.integers(5, 50, size=10), labels)
    log_p = calibrated_log_probabilities(fitted, [[-60.0, -60.0, -60.0]], log_prior, [20])
    assert 0.02 < np.exp(log_p[0, 2]) < 1 / 3


def test_the_unit_of_length_does_not_matter():
    """Lengths counted in units of 100 tokens give the same probabilities."""
    log_likelihoods, log_prior, num_tokens, labels = simulated_scores(
        num_documents=80,
        num_classes=3,
        scale=0.1,
        slope=np.array([0.01, 0.0, -0.01]),
        bias=np.zeros(3),
        seed=5,
    )
    in_tokens = fit_calibration(log_likelihoods, log_prior, num_tokens, labels)
    in_hundreds = fit_calibration(log_likelihoods, log_prior, num_tokens / 100, labels)
    np.testing.assert_allclose(
        calibrated_log_probabilities(in_tokens, log_likelihoods, log_prior, num_tokens),
        calibrated_log_probabilities(in_hundreds, log_likelihoods, log_prior, num_tokens / 100),
        atol=1e-5,
    )


def test_identity_is_the_raw_posterior():
    """Without calibration the log-probabilities are the log-softmax of the joint."""
    scores = np.array([[-1200.0, -1210.0], [-3.0, -2.0]])
    log_prior = np.log([0.9, 0.1])
    np.testing.assert_allclose(
        calibrated_log_probabilities(Calibration.identity(2), scores, log_prior, [400, 2]),
        log_softmax(scores + log_prior, axis=1),
        rtol=1e-14,
    )


def test_json_round_trip(tmp_path):
    """A calibration written as JSON text and read back is equal to the last bit."""
    calibration = Calibration(scale=0.1 + 0.2, length_slope=(1e-17, -1e-17), bias=(2 / 3, -2 / 3))
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(calibration.to_json()), encoding="utf-8")
    assert Calibration.read(path, 2) == calibration
