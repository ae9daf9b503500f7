"""Bayes' rule on summed log-likelihoods."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.naive_bayes import MultinomialNB

from accel_gpt2.classify import bayes
from accel_gpt2.errors import UserError

SCORES = arrays(
    np.float64,
    st.tuples(st.integers(1, 8), st.integers(2, 6)),
    elements=st.floats(-1e9, 1e9),
)


def test_agrees_with_naive_bayes():
    """A unigram model per class under our Bayes' rule is scikit-learn's multinomial naive Bayes."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.5, size=(300, 12))
    labels = rng.choice(3, size=300, p=[0.6, 0.3, 0.1])
    reference = MultinomialNB().fit(counts, labels)
    log_likelihoods = counts @ reference.feature_log_prob_.T

    log_prior = bayes.log_priors(np.bincount(labels).tolist(), "training")

    np.testing.assert_allclose(log_prior, reference.class_log_prior_, rtol=1e-12)
    joint = bayes.joint_log_probabilities(log_likelihoods, log_prior)
    np.testing.assert_allclose(bayes.posteriors(joint), reference.predict_proba(counts), atol=1e-12)
    np.testing.assert_array_equal(
        bayes.predict(log_likelihoods, log_prior), reference.predict(counts)
    )


def test_posterior_of_a_long_document_is_exact():
    """At -1000 nats, where a plain exp is zero, the posterior is the exact fraction."""
    joint = [[-1000 + math.log(3), -1000.0, -1000 + math.log(2)]]
    expected = [float(Fraction(part, 6)) for part in (3, 1, 2)]
    np.testing.assert_allclose(bayes.posteriors(joint)[0], expected, rtol=1e-12)


@given(SCORES)
def test_posteriors_are_probabilities(joint):
    """Whatever the finite scores, rows are finite, sum to 1 and put the most on the prediction."""
    probabilities = bayes.posteriors(joint)
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-12)
    predictions = bayes.predict(joint, np.zeros(joint.shape[1]))
    rows = np.arange(len(joint))
    np.testing.assert_array_equal(probabilities[rows, predictions], probabilities.max(axis=1))


@given(SCORES, st.floats(-1e6, 1e6))
def test_a_constant_per_document_changes_nothing(joint, shift):
    """What all classes share, such as the tokens' own rarity, does not move the posterior."""
    # Rounded, so that the shifted sums are exact to far below what is compared.
    joint = np.round(joint / 1e6)
    np.testing.assert_allclose(
        bayes.posteriors(joint + round(shift)), bayes.posteriors(joint), rtol=1e-9, atol=1e-300
    )


def test_the_prior_decides_between_equal_likelihoods():
    """With equal likelihoods the more frequent class wins under training priors, not uniform."""
    scores = [[-50.0, -50.0]]
    assert bayes.predict(scores, bayes.log_priors([10, 30], "training")).tolist() == [1]
    assert bayes.predict(scores, bayes.log_priors([10, 30], "uniform")).tolist() == [0]


def test_ties_go_to_the_lowest_index():
    """Equal joint probabilities are settled by the order of the classes."""
    assert bayes.predict([[-2.0, -1.0, -1.0]], np.zeros(3)).tolist() == [1]


def test_a_class_without_documents_has_no_training_prior():
    """A zero count is an error under training priors and no matter under uniform ones."""
    with pytest.raises(UserError, match=r"Class 1 has no training document.*priors=uniform"):
        bayes.log_priors([5, 0, 2], "training")
    np.testing.assert_allclose(np.exp(bayes.log_priors([5, 0, 2], "uniform")), 1 / 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_diverged_model_is_named(bad):
    """A score that is not finite ends in a sentence, never in a silent prediction."""
    scores = np.zeros((4, 3))
    scores[2, 1] = bad
    with pytest.raises(UserError, match=r"^1 log-likelihoods .* document 2 .* class 1"):
        bayes.predict(scores, np.zeros(3))
