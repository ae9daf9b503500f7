"""Which of several classifiers is better: every pair on the same documents, and over seeds.

`correct` says for every test document, in one order for all, whether a classifier gets it right.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from accel_gpt2.classify.bayes import FloatArray
from accel_gpt2.classify.metrics import mcnemar_exact, paired_accuracy_difference_interval

SIGNIFICANCE_LEVEL = 0.05


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """Adjusted p-values of a family of tests, in the order given (Holm 1979, step-down).

    Rejecting where they are at most a level keeps the chance of even one false rejection in the
    family below that level, however the tests depend on each other.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    ascending = np.argsort(p)
    stepped = np.maximum.accumulate(p[ascending] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[ascending] = np.minimum(stepped, 1.0)
    return adjusted


def compare_pairs(
    correct: Mapping[str, npt.ArrayLike], *, seed: int = 0, num_bootstrap: int = 10_000
) -> list[dict[str, Any]]:
    """Every pair of classifiers, in the order of the mapping, with Holm's correction over them all.

    `accuracy_difference` is accuracy(a) - accuracy(b) and `interval_95` its paired percentile
    bootstrap interval; `only_a` and `only_b` count the documents that one alone gets right;
    `p_value` is McNemar's exact one. These speak of other test documents, not of other seeds: see
    `accuracy_over_seeds`.

    >>> pair, = compare_pairs({"3": [True] * 9 + [False], "5": [False] * 8 + [True] * 2})
    >>> pair["a"], pair["b"], round(pair["accuracy_difference"], 6), pair["only_a"], pair["only_b"]
    ('3', '5', 0.7, 8, 1)
    >>> round(pair["p_value"], 5), pair["significant"]
    (0.03906, True)
    """
    right = {name: np.asarray(values, dtype=bool) for name, values in correct.items()}
    assert len({values.shape for values in right.values()}) <= 1, "not the same documents"
    pairs = list(combinations(right, 2))
    tests = [mcnemar_exact(right[a], right[b]) for a, b in pairs]
    adjusted = holm([test["p_value"] for test in tests])
    return [
        {
            "a": a,
            "b": b,
            "accuracy_difference": float(right[a].mean() - right[b].mean()),
            "interval_95": paired_accuracy_difference_interval(
                right[a], right[b], seed=seed, num_bootstrap=num_bootstrap
            ),
            "only_a": test["only_a"],
            "only_b": test["only_b"],
            "p_value": test["p_value"],
            "p_value_holm": float(p_value_holm),
            "significant": bool(p_value_holm <= SIGNIFICANCE_LEVEL),
        }
        for (a, b), test, p_value_holm in zip(pairs, tests, adjusted, strict=True)
    ]


def accuracy_over_seeds(correct: Sequence[npt.ArrayLike]) -> dict[str, Any]:
    """Accuracy of the same training with several seeds, its two uncertainties kept apart.

    `correct` is [num_seeds, num_documents]. `accuracy` has one value per seed and `accuracy_mean`
    their mean. `accuracy_standard_deviation`, the sample standard deviation over seeds, says how
    far another seed would move the accuracy on these documents; it is None for one seed.
    `accuracy_standard_error_of_test` says how far other test documents would move the mean over
    these seeds: the standard deviation over documents of the share of seeds that get a document
    right, divided by the square root of their number. For one seed it is the binomial one.

    >>> result = accuracy_over_seeds([[True, True, True, False], [True, True, False, False]])
    >>> result["accuracy"], result["accuracy_mean"]
    ([0.75, 0.5], 0.625)
    >>> round(result["accuracy_standard_deviation"], 6)
    0.176777
    >>> round(result["accuracy_standard_error_of_test"], 6)
    0.207289
    """
    right = np.asarray(correct, dtype=np.float64)
    num_seeds, num_documents = right.shape
    accuracy = right.mean(axis=1)
    return {
        "accuracy": accuracy.tolist(),
        "accuracy_mean": float(accuracy.mean()),
        "accuracy_standard_deviation": float(accuracy.std(ddof=1)) if num_seeds > 1 else None,
        "accuracy_standard_error_of_test": float(right.mean(axis=0).std() / np.sqrt(num_documents)),
    }
