"""Curves against plain loops, closed forms and other libraries."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import mannwhitneyu

from accel_gpt2.classify import bayes, curves
from accel_gpt2.classify.calibration import Calibration

LOG_PRIOR = np.log([0.5, 0.2, 0.3])


def simulated_tokens(num_documents=200, num_classes=3, seed=0):
    """Per-token log-likelihoods in which a document's own class is better by a little per token."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_documents)
    num_tokens = rng.integers(1, 71, num_documents)
    flat = rng.normal(-4, 1, (num_classes, num_tokens.sum())).astype(np.float32)
    flat[np.repeat(labels, num_tokens), np.arange(num_tokens.sum())] += 0.3
    return flat, num_tokens, labels


def summed(flat, num_tokens):
    """log p(x|c) of whole documents, [documents, classes]."""
    ends = np.cumsum(num_tokens)
    spans = zip(ends - num_tokens, ends, strict=True)
    return np.array([flat[:, start:end].sum(axis=1, dtype=float) for start, end in spans])


def test_accuracy_by_tokens_equals_a_plain_loop():
    """Every point is Bayes' rule on the first tokens of every document, and points double."""
    flat, num_tokens, labels = simulated_tokens()
    curve = curves.accuracy_by_tokens_read(list(flat), num_tokens, labels, LOG_PRIOR)
    assert [point["tokens"] for point in curve] == [1, 2, 4, 8, 16, 32, 64, num_tokens.max()]
    starts = np.cumsum(num_tokens) - num_tokens
    for point in curve:
        right = 0
        for start, length, label in zip(starts, num_tokens, labels, strict=True):
            end = start + min(length, point["tokens"])
            scores = [flat[c, start:end].astype(float).sum() + LOG_PRIOR[c] for c in range(3)]
            right += int(np.argmax(scores)) == label
        assert point["accuracy"] == right / len(labels), point
    assert curve[0]["accuracy"] < curve[3]["accuracy"] < curve[-1]["accuracy"]
    assert json.loads(json.dumps(curve, allow_nan=False)) == curve


def test_the_last_point_is_the_whole_text():
    """Having read everything it is the accuracy that the summed log-likelihoods give."""
    flat, num_tokens, labels = simulated_tokens(seed=1)
    curve = curves.accuracy_by_tokens_read(list(flat), num_tokens, labels, LOG_PRIOR)
    expected = np.mean(bayes.predict(summed(flat, num_tokens), LOG_PRIOR) == labels)
    assert curve[-1]["accuracy"] == expected


def test_intervals_are_wilsons():
    """The interval of a point is Wilson's score interval from its formula."""
    flat, num_tokens, labels = simulated_tokens()
    n, z = len(labels), 1.959963984540054
    curve = curves.accuracy_by_tokens_read(list(flat), num_tokens, labels, LOG_PRIOR)
    for point in curve:
        p = point["accuracy"]
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        assert point["interval_95"] == pytest.approx([centre - half, centre + half])
    assert len(curve) == 8


@pytest.mark.parametrize(("longest", "points"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5])])
def test_points_of_short_documents(longest, points):
    """The points end at the longest document, once."""
    flat = np.zeros((2, longest), dtype=np.float32)
    curve = curves.accuracy_by_tokens_read(list(flat), [longest], [0], np.log([0.6, 0.4]))
    assert [point["tokens"] for point in curve] == points


def test_other_lengths_are_a_fault():
    """Log-likelihoods that do not belong to the lengths are not cut up silently."""
    with pytest.raises(AssertionError, match="one log-likelihood for every token"):
        curves.accuracy_by_tokens_read([np.zeros(5), np.zeros(5)], [2, 2], [0, 1], np.zeros(2))


def test_single_precision_does_not_accumulate():
    """Late documents of a large file are summed as exactly as early ones."""
    num_documents, length = 20_000, 500
    flat = np.full((2, num_documents * length), -7.3, dtype=np.float32)
    flat[1, 0::length] = np.float32(-7.3001)  # class 0 is better by 1e-4 nats in every document
    curve = curves.accuracy_by_tokens_read(
        list(flat), np.full(num_documents, length), np.zeros(num_documents), np.log([0.5, 0.5])
    )
    assert [point["accuracy"] for point in curve] == [1.0] * 10


def simulated_posteriors(num_documents=300, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (num_documents, 3))
    log_p = logits - logsumexp(logits, axis=1, keepdims=True)
    labels = np.array([rng.choice(3, p=p / p.sum()) for p in np.exp(log_p)])
    return labels, log_p


def test_risk_equals_a_plain_loop():
    """Risk at a coverage is the error rate of the surest documents, the last one that of all."""
    labels, log_p = simulated_posteriors()
    surest_first = np.argsort(-log_p.max(axis=1))
    wrong = (log_p.argmax(axis=1) != labels)[surest_first]
    points = curves.risk_coverage(labels, log_p)
    assert [point["coverage"] for point in points] == [pytest.approx(i / 20) for i in range(1, 21)]
    for point in points:
        assert point["risk"] == pytest.approx(wrong[: round(point["coverage"] * 300)].mean())
    assert points[0]["risk"] < points[-1]["risk"] == pytest.approx(wrong.mean())
    assert json.loads(json.dumps(points, allow_nan=False)) == points


@pytest.mark.parametrize("seed", range(3))
def test_equally_sure_documents_have_no_order(seed):
    """With one confidence everywhere the risk is the error rate at every coverage."""
    labels = np.random.default_rng(seed).permutation([0] * 70 + [1] * 30)
    log_p = np.log(np.tile([0.8, 0.2], (100, 1)))
    assert [point["risk"] for point in curves.risk_coverage(labels, log_p)] == [
        pytest.approx(0.3)
    ] * 20


def test_saturated_probabilities_still_rank():
    """Probabilities that all round to 1 are ranked by their margins."""
    log_p = np.array([[0.0, -900.0], [0.0, -800.0], [0.0, -700.0], [0.0, -600.0]])
    risks = [point["risk"] for point in curves.risk_coverage([0, 0, 0, 1], log_p)]
    assert risks[:15] == [0.0] * 15
    assert risks[-1] == 0.25


def test_log_ratios_of_every_document_are_counted():
    """The counts are NumPy's of the ratios, by true class, with 0 an edge."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 500)
    scores = rng.normal(-300, 10, (500, 3))
    scores[np.arange(500), labels] += 8
    result = curves.log_ratio_histograms(labels, scores, ("a", "b", "c"))
    edges = np.array(result["edges"])
    assert 0.0 in result["edges"]
    assert 40 <= len(edges) - 1 <= 42
    np.testing.assert_allclose(np.diff(edges), np.diff(edges)[0])
    for index, name in enumerate("abc"):
        rows = scores[labels == index]
        ratios = rows[:, index] - np.delete(rows, index, axis=1).max(axis=1)
        assert sum(result["counts"][name]) == len(rows)
        positive = np.array(result["counts"][name])[edges[:-1] >= 0].sum()
        assert positive == (ratios > 0).sum()
        inner = np.histogram(ratios, edges)[0][1:-1]
        assert result["counts"][name][1:-1] == inner.tolist()
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_one_strange_document_does_not_stretch_the_axis():
    """A document a thousand times farther out falls into the end bin."""
    scores = np.array([[0.0, -1.0]] * 500 + [[1000.0, 0.0]])
    result = curves.log_ratio_histograms([0] * 501, scores, ("a", "b"))
    assert result["edges"][-1] == pytest.approx(1.0)
    assert sum(result["counts"]["a"]) == result["counts"]["a"][-1] == 501
    assert sum(result["counts"]["b"]) == 0


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=1, max_size=20),
    st.integers(0, 1),
)
def test_histograms_of_any_scores(scores, label):
    """Edges increase, 0 is among them, and no document is lost."""
    result = curves.log_ratio_histograms([label] * len(scores), scores, ("a", "b"))
    assert np.all(np.diff(result["edges"]) > 0)
    assert 0.0 in result["edges"]
    assert sum(map(sum, result["counts"].values())) == len(scores)


def auroc(inside, outside):
    """The Mann-Whitney form of the area, from SciPy."""
    return mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside))


def test_out_of_distribution_scores_equal_mann_whitney():
    """The three areas are those of density, density per token and calibrated probability."""
    rng = np.random.default_rng(0)
    lengths, other_lengths = rng.integers(5, 60, 300), rng.integers(5, 60, 200)
    inside = -4.0 * lengths[:, None] + rng.normal(0, 3, (300, 3))
    outside = -4.6 * other_lengths[:, None] + rng.normal(0, 2, (200, 3))
    calibration = Calibration(scale=0.4, length_slope=(0.02, -0.02, 0.0), bias=(0.3, 0.0, -0.3))
    result = curves.out_of_distribution_aurocs(
        inside, lengths, outside, other_lengths, LOG_PRIOR, calibration
    )

    def scores(log_likelihoods, lengths):
        density = np.log(np.exp(log_likelihoods + LOG_PRIOR).sum(axis=1))
        slopes, biases = np.array([0.02, -0.02, 0.0]), np.array([0.3, 0.0, -0.3])
        p = np.exp(0.4 * log_likelihoods + LOG_PRIOR + np.outer(lengths, slopes) + biases)
        return density, density / lengths, p.max(axis=1) / p.sum(axis=1)

    both = zip(scores(inside, lengths), scores(outside, other_lengths), strict=True)
    expected = [auroc(a, b) for a, b in both]
    names = ("auroc", "auroc_per_token", "auroc_max_probability")
    assert [result[name] for name in names] == pytest.approx(expected)
    assert result["num_documents"] == 200
    assert result["auroc_per_token"] > 0.9 > result["auroc"] > 0.5
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_posteriors_have_no_density():
    """A discriminative classifier has only its confidence, and the rest is unknown."""
    log_p = np.log([[0.9, 0.1], [0.2, 0.8]])
    unsure = np.log([[0.5, 0.5], [0.6, 0.4]])
    result = curves.out_of_distribution_aurocs(
        log_p, [3, 3], unsure, [3, 3], np.zeros(2), Calibration.identity(2), posteriors_only=True
    )
    assert result == {
        "num_documents": 2,
        "auroc": None,
        "auroc_per_token": None,
        "auroc_max_probability": 1.0,
    }
