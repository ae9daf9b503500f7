"""Comparisons of several classifiers, against definitions, simulations and SciPy."""

import json
import math
from statistics import stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from accel_gpt2.classify import metrics
from accel_gpt2.classify.statistics import accuracy_over_seeds, compare_pairs, holm

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def holm_rejects(p_values, level):
    """Holm's procedure as he states it: step down until the first that is not rejected."""
    rejected = set()
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] * (len(p_values) - step) > level:
            break
        rejected.add(index)
    return rejected


@given(P_VALUES, st.floats(0, 0.999))
def test_holm_rejects_what_the_procedure_rejects(p_values, level):
    """Adjusted p-values are at most a level exactly where the step-down procedure rejects."""
    adjusted = holm(p_values)
    assert set(np.flatnonzero(adjusted <= level)) == holm_rejects(p_values, level)


@given(P_VALUES)
def test_holm_lies_between_no_correction_and_bonferroni(p_values):
    """It never helps a test, is never stricter than Bonferroni, and keeps the order."""
    adjusted = holm(p_values)
    assert np.all(adjusted >= p_values)
    assert np.all(adjusted <= np.minimum(len(p_values) * np.array(p_values), 1) + 1e-12)
    assert np.all(np.diff(adjusted[np.argsort(p_values)]) >= 0)


def test_holm_bounds_the_familywise_error():
    """Of families of eight tests without any effect about one in twenty rejects something."""
    p_values = np.random.default_rng(0).random((4000, 8))
    share = np.mean([holm(family).min() <= 0.05 for family in p_values])
    assert share == pytest.approx(1 - (1 - 0.05 / 8) ** 8, abs=0.011)


def correct_matrix(accuracies, num_documents=2000, seed=0):
    """Classifiers that share their hard documents, as real ones do."""
    difficulty = np.random.default_rng(seed).random(num_documents)
    own = np.random.default_rng(seed + 1).normal(0, 0.03, (len(accuracies), num_documents))
    return {
        name: difficulty + noise < accuracy
        for (name, accuracy), noise in zip(accuracies.items(), own, strict=True)
    }


def test_every_pair_is_compared_once_and_as_the_two_alone():
    """Pairs keep the order given; interval, counts and p-value are those of the two alone."""
    correct = correct_matrix({"1a": 0.80, "3": 0.88, "5": 0.885, "7a": 0.5})
    pairs = compare_pairs(correct, seed=3, num_bootstrap=2000)
    assert [(pair["a"], pair["b"]) for pair in pairs] == [
        ("1a", "3"), ("1a", "5"), ("1a", "7a"), ("3", "5"), ("3", "7a"), ("5", "7a"),
    ]  # fmt: skip
    for pair in pairs:
        a, b = correct[pair["a"]], correct[pair["b"]]
        only_a, only_b = int((a > b).sum()), int((b > a).sum())
        assert (pair["only_a"], pair["only_b"]) == (only_a, only_b)
        assert pair["accuracy_difference"] == pytest.approx((only_a - only_b) / 2000)
        assert pair["p_value"] == pytest.approx(binomtest(only_a, only_a + only_b).pvalue)
        assert pair["interval_95"] == metrics.paired_accuracy_difference_interval(
            a, b, seed=3, num_bootstrap=2000
        )
    assert json.loads(json.dumps(pairs, allow_nan=False)) == pairs


def test_significance_is_judged_after_the_correction():
    """A pair that alone would pass at 0.05 does not pass among many."""
    # 15 of 20 differing documents: exact p = 0.0414.
    a = np.array([True] * 15 + [False] * 5 + [True] * 80)
    b = np.array([False] * 15 + [True] * 5 + [True] * 80)
    (alone,) = compare_pairs({"a": a, "b": b})
    assert alone["significant"]
    assert alone["p_value_holm"] == alone["p_value"] == pytest.approx(0.0414, abs=1e-4)
    among = compare_pairs({"a": a, "b": b, "c": b})
    assert [pair["significant"] for pair in among] == [False, False, False]
    # Equal p-values carry the factor of the first of them.
    assert (
        among[0]["p_value_holm"] == among[1]["p_value_holm"] == pytest.approx(3 * 0.0414, abs=1e-3)
    )
    assert among[2]["p_value"] == among[2]["p_value_holm"] == 1.0


def test_one_classifier_has_no_pairs():
    """Nothing to compare is an empty list."""
    assert compare_pairs({"3": [True, False]}) == []


def test_different_documents_are_not_compared():
    """Vectors of different lengths are a fault of the caller."""
    with pytest.raises(AssertionError, match="not the same documents"):
        compare_pairs({"a": [True], "b": [True, False]})


def test_one_seed_has_test_noise_only():
    """The spread over one seed is unknown, and the noise of the test is the binomial one."""
    result = accuracy_over_seeds([[True] * 90 + [False] * 10])
    assert result["accuracy_standard_deviation"] is None
    assert result["accuracy_standard_error_of_test"] == pytest.approx(math.sqrt(0.9 * 0.1 / 100))


def test_the_two_uncertainties_are_told_apart():
    """Simulated trainings: each number finds the variance that it names, and not the other's."""
    rng = np.random.default_rng(0)
    num_seeds, num_documents = 400, 500
    difficulty = np.arange(num_documents) / num_documents

    # Seeds differ in skill by 0.03 and documents are fixed.
    skill = rng.normal(0.8, 0.03, num_seeds)
    result = accuracy_over_seeds(difficulty[None, :] < skill[:, None])
    assert result["accuracy_standard_deviation"] == pytest.approx(0.03, rel=0.15)
    assert result["accuracy_mean"] == pytest.approx(0.8, abs=0.005)

    # Seeds are equal, and documents are drawn anew: the error is what the means then scatter by.
    means = (rng.random((4000, num_documents)) < 0.8).mean(axis=1)
    same = accuracy_over_seeds(np.tile(difficulty < 0.8, (5, 1)))
    assert same["accuracy_standard_deviation"] == pytest.approx(0.0, abs=1e-12)
    assert same["accuracy_standard_error_of_test"] == pytest.approx(means.std(), rel=0.1)


def test_seeds_summary_equals_a_bootstrap_over_documents():
    """With errors of their own, seeds average out a part of the noise of the test."""
    rng = np.random.default_rng(0)
    right = rng.random((3, 400)) < rng.choice([0.6, 0.95], 400)
    result = accuracy_over_seeds(right)
    assert result["accuracy_standard_deviation"] == pytest.approx(stdev(right.mean(axis=1)))
    drawn = [right[:, rng.integers(0, 400, 400)].mean() for _ in range(4000)]
    assert result["accuracy_standard_error_of_test"] == pytest.approx(np.std(drawn), rel=0.05)


def test_seeds_are_json():
    """The summary survives JSON as it is."""
    result = accuracy_over_seeds([[True, False], [True, True]])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
