"""The verdict says who wins, hedges where it must, and answers what the arms were set up to ask."""

from typing import Any

import pytest

from accel_gpt2.classify.verdict import verdict_sentences


def entry(id_: str, kind: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    """An entry of comparison.json, as far as the verdict reads it."""
    metrics = {
        "accuracy": accuracy,
        "accuracy_interval_95": [accuracy - 0.01, accuracy + 0.01],
        "majority_class_accuracy": 0.5,
        "training": {"seconds": 95.0, "cost_usd": None},
    }
    return {
        "id": id_,
        "name": f"model {id_}",
        "kind": kind,
        "status": "done",
        "metrics": {**metrics, **changes.pop("metrics", {})},
        "by_seed": {"seeds": [0], "accuracy_mean": accuracy, "accuracy_standard_deviation": None},
        **changes,
    }


def pair(a: str, b: str, difference: float, p_value: float) -> dict[str, Any]:
    """A pair of comparison.json."""
    return {
        "a": a,
        "b": b,
        "accuracy_difference": difference,
        "p_value_holm": p_value,
        "significant": p_value <= 0.05,
    }


def test_a_significant_winner() -> None:
    """By how much, over the best of another kind, with the test and the cost of both."""
    entries = [
        entry("1a", "classical", 0.875),
        entry("3", "generative", 0.9, metrics={"training": {"seconds": 3600, "cost_usd": 1.5}}),
        entry("4", "generative", 0.89),
    ]
    pairs = [pair("1a", "3", -0.025, 0.0004), pair("3", "4", 0.01, 0.2), pair("1a", "4", -0.015, 1)]
    first, cost, lora = verdict_sentences(entries, pairs)
    assert first == (
        "model 3 (3) wins: its test accuracy is 90.0% (95% interval 89.0 to 91.0), 2.5 points "
        "above model 1a (1a), which is more than chance explains (exact McNemar test, p < 0.001 "
        "after Holm's correction)."
    )
    assert cost == "Training took 1 h 00 min ($1.50) for 3 and 1 min 35 s for 1a."
    assert lora.startswith("LoRA: model 4 (4) is 1.0 points below model 3 (3), which may be chance")


def test_no_clear_winner() -> None:
    """Without significance nobody wins, whoever comes first."""
    entries = [entry("3", "generative", 0.9), entry("5", "discriminative", 0.903)]
    first, _, objective = verdict_sentences(entries, [pair("3", "5", -0.003, 0.6)])
    assert first.startswith("No clear winner: model 5 (5) comes first")
    assert "only 0.3 points above model 3 (3), which may be chance" in first
    assert objective.startswith("Objective: model 5 (5) is 0.3 points above model 3 (3), which may")


def test_a_tie() -> None:
    """Equal accuracies are called equal."""
    entries = [entry("3", "generative", 0.9), entry("8", "hybrid", 0.9)]
    first, _, term = verdict_sentences(entries, [pair("3", "8", 0.0, 1.0)])
    assert first.startswith("No winner: model 3 (3) and model 8 (8) get equally many")
    assert term.endswith("model 8 (8) and model 3 (3) get equally many documents right.")


def test_every_contrast_is_answered_where_both_entries_are_there() -> None:
    """Objective, backbone and estimator, each with its direction, and none of a missing entry."""
    entries = [
        entry("3", "generative", 0.9),
        entry("5", "discriminative", 0.92),
        entry("6", "discriminative", 0.95),
        entry("7a", "masked", 0.6),
        entry("7b", "masked", 0.8),
        {**entry("7c", "masked", 0.8), "status": "missing", "metrics": None},
    ]
    pairs = [
        pair("3", "5", -0.02, 0.01),
        pair("3", "6", -0.05, 0.001),
        pair("5", "6", -0.03, 0.01),
        pair("6", "3", 0.05, 0.001),
        pair("7a", "7b", -0.2, 0.0001),
    ]
    said = verdict_sentences(entries, pairs)[2:]
    assert [sentence.split(" (")[0] for sentence in said] == [
        "Objective: model 5",
        "Backbone: model 6",
        "Estimator: model 7b",
    ]
    assert [sentence.split(") is ")[1].split(" model")[0] for sentence in said] == [
        "2.0 points above",
        "3.0 points above",
        "20.0 points above",
    ]
    assert not any("chance" in sentence for sentence in said)


def test_seeds_are_told_apart_from_the_test_documents() -> None:
    """With several seeds their mean and spread stand beside the interval."""
    by_seed = {"seeds": [0, 1, 2], "accuracy_mean": 0.894, "accuracy_standard_deviation": 0.0041}
    (first,) = verdict_sentences([entry("3", "generative", 0.9, by_seed=by_seed)], [])
    assert first == (
        "Only model 3 (3) is evaluated so far; its test accuracy is 90.0% (95% interval 89.0 to "
        "91.0; over 3 seeds 89.4%, standard deviation 0.4 points)."
    )


@pytest.mark.parametrize(("accuracy", "said"), [(0.5, True), (0.51, False)])
def test_what_is_no_better_than_a_constant_is_said(accuracy: float, said: bool) -> None:
    """A comparison of failures does not read like one of classifiers."""
    sentences = verdict_sentences([entry("3", "generative", accuracy)], [])
    assert any("always answering the largest class (50.0%)" in x for x in sentences) == said


def test_nothing_done_is_said() -> None:
    """The first comparison.json of a run has no result yet."""
    missing = {**entry("3", "generative", 0.9), "status": "missing", "metrics": None}
    assert verdict_sentences([missing], []) == ["No arm is evaluated yet."]
