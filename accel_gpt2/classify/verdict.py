"""The outcome of a comparison in sentences: who wins, by how much, is it chance, what did it cost.

`entries` and `pairs` are those of comparison.json.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from accel_gpt2.catalog.arms import CONTRASTS
from accel_gpt2.units import format_seconds


def verdict_sentences(
    entries: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]
) -> list[str]:
    """First which entry wins and what it costs, then one sentence for each contrast.

    The runner-up is the best entry of another kind than the winner's, where there is one.
    """
    done = sorted(
        (entry for entry in entries if entry["status"] == "done"),
        key=lambda entry: -entry["metrics"]["accuracy"],
    )
    if not done:
        return ["No arm is evaluated yet."]
    best = done[0]
    sentences = []
    if len(done) == 1:
        sentences.append(f"Only {_called(best)} is evaluated so far; its {_accuracy(best)}.")
    else:
        others = [entry for entry in done if entry["kind"] != best["kind"]] or done[1:]
        sentences.append(_winner(best, others[0], _pair(pairs, best["id"], others[0]["id"])))
        sentences.append(_costs(best, others[0]))
    majority = best["metrics"]["majority_class_accuracy"]
    if best["metrics"]["accuracy"] <= majority:
        sentences.append(
            f"No arm is better than always answering the largest class ({_percent(majority)})."
        )
    by_id = {entry["id"]: entry for entry in done}
    for contrast in CONTRASTS:
        if contrast.in_verdict and {contrast.entry, contrast.against} <= by_id.keys():
            pair = _pair(pairs, contrast.entry, contrast.against)
            outcome = _contrast(by_id[contrast.entry], by_id[contrast.against], pair)
            sentences.append(f"{contrast.topic}: {outcome}")
    return sentences


def _winner(best: Mapping[str, Any], other: Mapping[str, Any], pair: Mapping[str, Any]) -> str:
    points = _points(pair["accuracy_difference"])
    if pair["significant"]:
        return (
            f"{_called(best)} wins: its {_accuracy(best)}, {points} above {_called(other)}, "
            f"which is more than chance explains ({_test(pair)})."
        )
    if pair["accuracy_difference"] == 0:
        return (
            f"No winner: {_called(best)} and {_called(other)} get equally many documents right; "
            f"the {_accuracy(best)}."
        )
    return (
        f"No clear winner: {_called(best)} comes first, its {_accuracy(best)}, but that is only "
        f"{points} above {_called(other)}, which may be chance ({_test(pair)})."
    )


def _costs(best: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return f"Training took {_cost(best)} for {best['id']} and {_cost(other)} for {other['id']}."


def _contrast(entry: Mapping[str, Any], against: Mapping[str, Any], pair: Mapping[str, Any]) -> str:
    difference = pair["accuracy_difference"]
    if difference == 0:
        return f"{_called(entry)} and {_called(against)} get equally many documents right."
    side = "above" if difference > 0 else "below"
    chance = "" if pair["significant"] else ", which may be chance"
    return (
        f"{_called(entry)} is {_points(difference)} {side} {_called(against)}{chance} "
        f"({_test(pair)})."
    )


def _pair(pairs: Sequence[Mapping[str, Any]], a: str, b: str) -> Mapping[str, Any]:
    """The comparison of a with b, whichever way round it is listed."""
    pair = next(x for x in pairs if {x["a"], x["b"]} == {a, b})
    sign = 1 if pair["a"] == a else -1
    return {**pair, "accuracy_difference": sign * pair["accuracy_difference"]}


def _called(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']} ({entry['id']})"


def _accuracy(entry: Mapping[str, Any]) -> str:
    low, high = entry["metrics"]["accuracy_interval_95"]
    text = (
        f"test accuracy is {_percent(entry['metrics']['accuracy'])} (95% interval {100 * low:.1f} "
        f"to {100 * high:.1f}"
    )
    deviation = entry["by_seed"]["accuracy_standard_deviation"]
    if deviation is not None:
        text += (
            f"; over {len(entry['by_seed']['seeds'])} seeds "
            f"{_percent(entry['by_seed']['accuracy_mean'])}, standard deviation "
            f"{_points(deviation)}"
        )
    return text + ")"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _points(difference: float) -> str:
    """
    >>> _points(-0.0123), _points(0.01)
    ('1.2 points', '1.0 points')
    """
    return f"{100 * abs(difference):.1f} points"


def _test(pair: Mapping[str, Any]) -> str:
    p_value = pair["p_value_holm"]
    shown = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return f"exact McNemar test, {shown} after Holm's correction"


def _cost(entry: Mapping[str, Any]) -> str:
    training = entry["metrics"]["training"]
    text = format_seconds(training["seconds"])
    usd = training["cost_usd"]
    return text if usd is None else f"{text} (${usd:.2f})"
