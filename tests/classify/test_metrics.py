"""Metrics against scikit-learn, SciPy and closed forms."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import bootstrap
from sklearn import metrics as sk

from accel_gpt2.classify import metrics
from accel_gpt2.classify.calibration import Calibration

NAMES = ("World", "Sports", "Business", "Sci/Tech")


def simulated(num_documents=400, num_classes=4, seed=0, temperature=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, size=num_documents)
    labels[:num_classes] = np.arange(num_classes)
    log_likelihoods = rng.normal(-300.0, 2.0, size=(num_documents, num_classes))
    log_likelihoods[np.arange(num_documents), labels] += 2.5
    log_prior = np.log(rng.dirichlet(np.full(num_classes, 30.0)))
    return labels, log_likelihoods * temperature, log_prior, rng.integers(5, 90, num_documents)


@pytest.fixture(scope="module")
def case():
    labels, log_likelihoods, log_prior, num_tokens = simulated()
    calibration = Calibration(
        scale=0.5, length_slope=(0.01, 0.0, -0.01, 0.0), bias=(0.1, -0.1, 0.0, 0.0)
    )
    result = metrics.classification_metrics(
        labels, log_likelihoods, log_prior, calibration, num_tokens, NAMES
    )
    logits = {
        "raw": log_likelihoods + log_prior,
        "calibrated": 0.5 * log_likelihoods
        + log_prior
        + np.outer(num_tokens, calibration.length_slope)
        + calibration.bias,
    }
    return labels, logits, result


def test_label_metrics_equal_scikit_learn(case):
    """Accuracy, macro-F1, precision, recall, F1 and confusion matrix are scikit-learn's."""
    labels, logits, result = case
    predictions = logits["raw"].argmax(axis=1)
    assert result["accuracy"] == sk.accuracy_score(labels, predictions)
    assert result["macro_f1"] == pytest.approx(sk.f1_score(labels, predictions, average="macro"))
    assert result["confusion_matrix"] == sk.confusion_matrix(labels, predictions).tolist()
    for name, score in (
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
        ("f1", sk.f1_score),
    ):
        expected = dict(zip(NAMES, score(labels, predictions, average=None), strict=True))
        assert result[name] == pytest.approx(expected), name


@pytest.mark.parametrize("kind", ["raw", "calibrated"])
def test_probability_metrics_equal_scikit_learn(case, kind):
    """NLL, Brier, AUROC and accuracy of both kinds of probabilities are scikit-learn's."""
    labels, logits, result = case
    probabilities = softmax(logits[kind], axis=1)
    block = result[kind]
    assert block["accuracy"] == np.mean(probabilities.argmax(axis=1) == labels)
    assert block["nll"] == pytest.approx(sk.log_loss(labels, probabilities))
    brier = sk.brier_score_loss(labels, probabilities, scale_by_half=False)
    assert block["brier"] == pytest.approx(brier)
    auroc = sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert block["auroc"] == pytest.approx(auroc)


@pytest.mark.parametrize("kind", ["raw", "calibrated"])
def test_expected_calibration_error_by_hand(case, kind):
    """ECE and its bins equal a plain loop over documents."""
    labels, logits, result = case
    bins = [[] for _ in range(15)]
    for row, label in zip(softmax(logits[kind], axis=1), labels, strict=True):
        bins[min(math.ceil(row.max() * 15), 15) - 1].append((row.max(), row.argmax() == label))
    ece = sum(
        len(rows) / len(labels) * abs(np.mean([r[1] for r in rows]) - np.mean([r[0] for r in rows]))
        for rows in bins
        if rows
    )
    block = result[kind]
    assert block["ece"] == pytest.approx(ece)
    assert [row["count"] for row in block["reliability"]] == [len(rows) for rows in bins]
    assert sum(row["count"] for row in block["reliability"]) == len(labels)


def test_overconfidence_has_a_known_calibration_error():
    """Certainty everywhere at 75% accuracy is a calibration error of a quarter."""
    log_p = np.log(np.tile([1 - 1e-12, 1e-12], (8, 1)))
    block = metrics.probability_metrics([0, 0, 0, 1] * 2, log_p)
    assert block["ece"] == pytest.approx(0.25)
    assert block["brier"] == pytest.approx(0.5)
    assert block["nll"] == pytest.approx(-math.log(1e-12) / 4)


def test_saturated_posteriors_still_rank():
    """Where every probability rounds to 0 or 1 AUROC is taken from the margins and has no ties."""
    labels = np.array([0, 0, 1, 1])
    log_likelihoods = np.array([[0.0, -900.0], [0.0, -800.0], [0.0, -700.0], [-900.0, 0.0]])
    result = metrics.classification_metrics(
        labels, log_likelihoods, np.log([0.5, 0.5]), Calibration.identity(2), [9] * 4, ("a", "b")
    )
    assert result["raw"]["auroc"] == 1.0
    assert result["raw"]["nll"] == pytest.approx(700 / 4)


def test_intervals_equal_scipys_bootstrap():
    """Drawing the confusion matrix gives the interval that SciPy gets by drawing documents."""
    labels, log_likelihoods, _, num_tokens = simulated()
    # A lopsided prior makes precision and recall differ.
    log_prior = np.log([0.91, 0.03, 0.03, 0.03])
    result = metrics.classification_metrics(
        labels,
        log_likelihoods,
        log_prior,
        Calibration.identity(4),
        num_tokens,
        NAMES,
        num_bootstrap=50_000,
    )
    predictions = (log_likelihoods + log_prior).argmax(axis=1)
    rng = np.random.default_rng(1)

    correct = bootstrap(
        ((predictions == labels).astype(float),), np.mean, method="percentile", rng=rng
    ).confidence_interval
    np.testing.assert_allclose(result["accuracy_interval_95"], correct, atol=0.004)

    macro_f1 = bootstrap(
        (labels, predictions),
        lambda a, b: sk.f1_score(a, b, average="macro"),
        paired=True,
        vectorized=False,
        n_resamples=400,
        method="percentile",
        rng=rng,
    ).confidence_interval
    np.testing.assert_allclose(result["macro_f1_interval_95"], macro_f1, atol=0.01)
    low, high = result["macro_f1_interval_95"]
    assert low < result["macro_f1"] < high


def test_the_seed_decides_the_interval():
    """The same seed repeats the interval exactly; another seed moves it a little."""
    arguments = (*simulated()[:3], Calibration.identity(4), simulated()[3], NAMES)
    first, again, other = (
        metrics.classification_metrics(*arguments, seed=seed, num_bootstrap=300)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first["macro_f1_interval_95"] != other["macro_f1_interval_95"]
    assert first["accuracy"] == other["accuracy"]


def test_everything_is_json(case):
    """The result survives JSON without NaN, arrays or NumPy numbers."""
    result = case[2]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_class_that_never_occurs_and_never_wins():
    """Its precision, recall and F1 are 0, its AUROC is left out, and nothing is NaN."""
    scores = np.array([[-1.0, -2.0, -90.0], [-2.0, -1.0, -90.0]])
    result = metrics.classification_metrics(
        [0, 1], scores, np.zeros(3), Calibration.identity(3), [4, 4], ("a", "b", "c")
    )
    json.dumps(result, allow_nan=False)
    assert (result["precision"]["c"], result["recall"]["c"], result["f1"]["c"]) == (0.0, 0.0, 0.0)
    assert result["macro_f1"] == pytest.approx(2 / 3)
    assert result["raw"]["auroc"] == 1.0


def test_one_class_only_has_no_auroc():
    """Documents of one class cannot be ranked against others: unknown, not a number."""
    assert metrics.probability_metrics([1, 1], np.log([[0.4, 0.6], [0.7, 0.3]]))["auroc"] is None


@settings(max_examples=20, deadline=None)
@given(num_documents=st.integers(2, 40), num_classes=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_metrics_stay_in_their_ranges(num_documents, num_classes, seed):
    """On any scores rates lie in [0, 1], Brier in [0, 2], and the interval holds the accuracy."""
    num_documents = max(num_documents, num_classes)
    labels, log_likelihoods, log_prior, num_tokens = simulated(
        num_documents, num_classes, seed, temperature=50.0
    )
    names = [f"class {i}" for i in range(num_classes)]
    result = metrics.classification_metrics(
        labels,
        log_likelihoods,
        log_prior,
        Calibration.identity(num_classes),
        num_tokens,
        names,
        num_bootstrap=400,
    )
    low, high = result["accuracy_interval_95"]
    assert 0 <= low <= result["accuracy"] <= high <= 1
    assert sum(map(sum, result["confusion_matrix"])) == num_documents
    for kind in ("raw", "calibrated"):
        assert 0 <= result[kind]["ece"] <= 1
        assert 0 <= result[kind]["brier"] <= 2
        assert result[kind]["nll"] >= 0
        assert 0 <= result[kind]["auroc"] <= 1


def test_bits_are_micro_averaged_over_the_documents_of_a_class():
    """Bits per byte and token equal a plain double loop; a class without documents is NaN."""
    rng = np.random.default_rng(5)
    labels = np.array([0, 0, 2, 2, 2])
    log_likelihoods = rng.normal(-100, 10, size=(5, 3))
    num_bytes, num_tokens = np.array([50, 80, 20, 90, 60]), np.array([12, 20, 6, 25, 15])
    per_byte = metrics.bits_per_byte_matrix(labels, log_likelihoods, num_bytes)
    per_token = metrics.bits_per_token_matrix(labels, log_likelihoods, num_tokens)
    for true in (0, 2):
        rows = [i for i in range(5) if labels[i] == true]
        for model in range(3):
            bits = sum(-log_likelihoods[i, model] * math.log2(math.e) for i in rows)
            assert per_byte[true, model] == pytest.approx(bits / sum(num_bytes[i] for i in rows))
            assert per_token[true, model] == pytest.approx(bits / sum(num_tokens[i] for i in rows))
    assert np.isnan(per_byte[1]).all()


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_tail(only_a, only_b, agree):
    """The p-value is twice the smaller binomial tail, at most 1, and symmetric."""
    correct_a = [True] * only_a + [False] * only_b + [True] * agree
    correct_b = [False] * only_a + [True] * only_b + [True] * agree
    result = metrics.mcnemar_exact(correct_a, correct_b)
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    assert (result["only_a"], result["only_b"]) == (only_a, only_b)
    assert result["p_value"] == pytest.approx(min(1.0, 2 * tail))
    assert metrics.mcnemar_exact(correct_b, correct_a)["p_value"] == pytest.approx(
        result["p_value"]
    )


def test_paired_difference_equals_scipys_bootstrap():
    """The paired interval is SciPy's, and it is signed a - b."""
    rng = np.random.default_rng(6)
    correct_b = rng.random(1000) < 0.8
    correct_a = np.where(rng.random(1000) < 0.9, correct_b, rng.random(1000) < 0.95)
    ours = metrics.paired_accuracy_difference_interval(correct_a, correct_b, seed=0)
    reference = bootstrap(
        (correct_a.astype(float), correct_b.astype(float)),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True,
        method="percentile",
        rng=rng,
    ).confidence_interval
    np.testing.assert_allclose(ours, reference, atol=0.003)
    flipped = metrics.paired_accuracy_difference_interval(correct_b, correct_a, seed=0)
    np.testing.assert_allclose(flipped, [-ours[1], -ours[0]], atol=0.003)
    assert ours[0] < correct_a.mean() - correct_b.mean() < ours[1]
