"""The tables on a comparison's page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accel_gpt2.catalog.arms import CONTRASTS
from accel_gpt2.report.comparison_form import Comparison, Entry, Pair, entries_done, metrics_of
from accel_gpt2.report.elements import (
    UNKNOWN,
    Table,
    percent,
    percent_interval,
    plain_value,
    points,
    points_interval,
    three_decimals,
    three_digits,
    treatments_table,
)
from accel_gpt2.units import format_bytes, format_count, format_seconds

_MOST_ENTRIES_IN_MATRIX = 12

OUT_OF_DISTRIBUTION_SCORES = {
    "auroc": "likelihood",
    "auroc_per_token": "likelihood per token",
    "auroc_max_probability": "largest probability",
}


def result_tables(comparison: Comparison) -> list[Table]:
    """Who is how good, whether that is chance, and what it took."""
    return _with_rows(
        _results_table(comparison),
        _questions_table(comparison),
        *_pairs_tables(comparison),
        _cost_table(comparison),
        _recall_table(comparison),
    )


def background_tables(comparison: Comparison) -> list[Table]:
    """What was compared, on which documents, and how it was set."""
    return _with_rows(
        _out_of_distribution_table(comparison),
        _arms_table(comparison),
        _class_counts_table(comparison),
        treatments_table(comparison.get("data_treatments") or []),
        _recipe_differences_table(comparison),
    )


def _with_rows(*tables: Table | None) -> list[Table]:
    return [table for table in tables if table and table.rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """`value` reads a cell's number from an entry's metrics, or None; `best` picks the column's
    bold ones."""

    header: str
    value: Callable[[Mapping[str, Any]], float | None]
    show: Callable[[Mapping[str, Any]], str]
    best: Callable[..., float] | None = None


def _entry_table(
    title: str, introduction: str, entries: Sequence[Entry], columns: Sequence[_Column]
) -> Table:
    """A row for each entry; a column, or a table, of which nothing is known is left out."""
    facts: list[Mapping[str, Any]] = [
        {**entry, **(entry.get("metrics") or {})} for entry in entries
    ]
    rows = [[f"{entry['id']}  {entry['name']}"] for entry in entries]
    header, strong = [""], set()
    for column in columns:
        values = [column.value(fact) for fact in facts]
        known = [value for value in values if value is not None]
        if not known:
            continue
        for row, (value, fact) in enumerate(zip(values, facts, strict=True)):
            rows[row].append(UNKNOWN if value is None else column.show(fact))
            if column.best and len(known) > 1 and value == column.best(known):
                strong.add((row, len(header)))
        header.append(column.header)
    return Table(
        title=title,
        introduction=introduction,
        header=tuple(header),
        rows=tuple(map(tuple, rows)) if len(header) > 1 else (),
        strong=frozenset(strong),
    )


def _results_table(comparison: Comparison) -> Table:
    def block(kind: str, key: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda fact: (fact.get(kind) or {}).get(key)

    def calibration_column(header: str, key: str) -> _Column:
        raw, calibrated = block("raw", key), block("calibrated", key)

        def value(fact: Mapping[str, Any]) -> float | None:
            known = calibrated(fact)
            return raw(fact) if known is None else known

        def show(fact: Mapping[str, Any]) -> str:
            pair = (raw(fact), calibrated(fact))
            return " → ".join(UNKNOWN if x is None else three_decimals(x) for x in pair)

        return _Column(header=header, value=value, show=show, best=min)

    spread = (
        "± is the standard deviation over seeds, which is the noise of training. "
        if len(comparison.get("seeds") or []) > 1
        else ""
    )
    return _entry_table(
        "Results",
        "The first seed, on the test documents; in brackets the 95% interval, which is the noise "
        f"of drawing these documents. {spread}Arrows lead from raw to calibrated probabilities. "
        "Lower is better from the negative log-likelihood (NLL) on; the best of a column is bold, "
        "and whether it is better than chance stands in “Every pair”. Bits per byte: the mean "
        "over classes, each under its own model.",
        entries_done(comparison),
        (
            _Column(
                header="Accuracy",
                value=lambda fact: fact["accuracy"],
                show=lambda fact: (
                    percent(fact["accuracy"]) + _bracketed(fact.get("accuracy_interval_95"))
                ),
                best=max,
            ),
            _Column(
                header="Over seeds",
                value=lambda fact: (fact.get("by_seed") or {}).get("accuracy_standard_deviation"),
                show=_over_seeds,
            ),
            _Column(
                header="Macro-F1",
                value=lambda fact: fact.get("macro_f1"),
                show=lambda fact: three_decimals(fact["macro_f1"]),
                best=max,
            ),
            _Column(
                header="AUROC",
                value=block("raw", "auroc"),
                show=lambda fact: three_decimals(fact["raw"]["auroc"]),
                best=max,
            ),
            calibration_column("NLL, nats", "nll"),
            calibration_column("Brier, 0 to 2", "brier"),
            calibration_column("Calibration error (ECE)", "ece"),
            _Column(
                header="Bits per byte",
                value=_own_bits_per_byte,
                show=lambda fact: three_decimals(_own_bits_per_byte(fact) or 0.0),
                best=min,
            ),
        ),
    )


def _bracketed(bounds: Sequence[float] | None) -> str:
    return f"\n({percent_interval(bounds)})" if bounds else ""


def _over_seeds(fact: Mapping[str, Any]) -> str:
    by_seed = fact["by_seed"]
    mean, deviation = by_seed.get("accuracy_mean"), by_seed["accuracy_standard_deviation"]
    shown = UNKNOWN if mean is None else percent(mean)
    return f"{shown} ± {100 * deviation:.1f}\n({len(by_seed.get('seeds') or [])} seeds)"


def _own_bits_per_byte(fact: Mapping[str, Any]) -> float | None:
    """The mean over classes of what their own model needs for their documents."""
    matrix = fact.get("bits_per_byte") or []
    own = [row[index] for index, row in enumerate(matrix) if row[index] is not None]
    return sum(own) / len(own) if own else None


def _cost_table(comparison: Comparison) -> Table:
    def training(key: str, header: str, show: Callable[[float], str]) -> _Column:
        return _Column(
            header=header,
            value=lambda fact: (fact.get("training") or {}).get(key),
            show=lambda fact: show(fact["training"][key]),
        )

    priced = any(
        (metrics_of(entry).get("training") or {}).get("cost_usd") is not None
        for entry in entries_done(comparison)
    )
    return _entry_table(
        "What it took",
        "The first seed, all classes together. A document is classified once under every class's "
        "model." + ("" if priced else " Costs are unknown, because no price_usd_per_hour was set."),
        entries_done(comparison),
        (
            training("seconds", "Training time", format_seconds),
            training("document_tokens", "Training tokens", format_count),
            training("tokens_per_second", "Tokens/s", format_count),
            training("peak_memory_bytes", "Peak memory", format_bytes),
            training("cost_usd", "Cost", lambda usd: f"${usd:,.2f}"),
            _Column(
                header="Classified documents/s",
                value=lambda fact: fact.get("documents_per_second"),
                show=lambda fact: three_digits(fact["documents_per_second"]),
            ),
        ),
    )


def _both_ways(comparison: Comparison) -> dict[tuple[str, str], Pair]:
    """Every pair of done entries by its ids, also turned round."""
    done = {entry["id"] for entry in entries_done(comparison)}
    pairs: dict[tuple[str, str], Pair] = {}
    for pair in comparison.get("pairs") or []:
        if {pair["a"], pair["b"]} <= done:
            bounds = pair.get("interval_95")
            pairs[pair["a"], pair["b"]] = pair
            pairs[pair["b"], pair["a"]] = {
                **pair,
                "a": pair["b"],
                "b": pair["a"],
                "accuracy_difference": -pair["accuracy_difference"],
                "interval_95": [-bounds[1], -bounds[0]] if bounds else None,
                "only_a": pair.get("only_b"),
                "only_b": pair.get("only_a"),
            }
    return pairs


def _questions_table(comparison: Comparison) -> Table:
    pairs = _both_ways(comparison)
    return Table(
        title="What made the difference",
        introduction=(
            "Entries that differ in one thing. The difference is the first's accuracy less the "
            "second's, in points."
        ),
        header=("Question", "Entries", "Outcome", "Difference, points", "95% interval"),
        rows=tuple(
            (
                f"{contrast.topic}: {contrast.question}",
                f"{contrast.entry} against {contrast.against}",
                _outcome(pair),
                points(pair["accuracy_difference"]),
                _optional(points_interval, pair.get("interval_95")),
            )
            for contrast in CONTRASTS
            if (pair := pairs.get((contrast.entry, contrast.against)))
        ),
        num_text_columns=3,
    )


def _outcome(pair: Pair) -> str:
    if not pair.get("significant"):
        return "may well be chance"
    return f"{pair['a'] if pair['accuracy_difference'] > 0 else pair['b']} is better"


def _pairs_tables(comparison: Comparison) -> list[Table]:
    """A matrix with a list that unfolds below it; of many entries the list alone."""
    pairs = _both_ways(comparison)
    ids = [entry["id"] for entry in entries_done(comparison)]
    matrix_fits = len(ids) <= _MOST_ENTRIES_IN_MATRIX
    listed = Table(
        title="Every pair in full" if matrix_fits else "Every pair",
        introduction=(
            "p is McNemar's exact test on the documents that one of the two alone gets right, "
            "then Holm's correction for testing all pairs; significant below 0.05."
        ),
        header=(
            "Entries",
            "Significant",
            "Difference, points",
            "95% interval",
            "Only the first right",
            "Only the second right",
            "p",
            "p, Holm",
        ),
        rows=tuple(
            (
                f"{pair['a']} − {pair['b']}",
                "yes" if pair.get("significant") else "no",
                points(pair["accuracy_difference"]),
                _optional(points_interval, pair.get("interval_95")),
                _optional(_count, pair.get("only_a")),
                _optional(_count, pair.get("only_b")),
                _optional(_p, pair.get("p_value")),
                _optional(_p, pair.get("p_value_holm")),
            )
            for pair in comparison.get("pairs") or []
            if (pair["a"], pair["b"]) in pairs
        ),
        num_text_columns=2,
        folded=matrix_fits,
    )
    if not matrix_fits:
        return [listed]
    cells = [[pairs.get((row, column)) for column in ids] for row in ids]
    matrix = Table(
        title="Every pair",
        introduction=(
            "The row's accuracy less the column's, in points, with its 95% interval (paired "
            "bootstrap) and McNemar's exact p after Holm's correction. ▲ the row is better, ▼ "
            "the column is better; without a mark the difference may well be chance."
        ),
        header=("", *ids),
        rows=tuple(
            (id_, *map(_pair_cell, cells_of_row))
            for id_, cells_of_row in zip(ids, cells, strict=True)
        ),
        compact=True,
        strong=frozenset(
            (row, column + 1)
            for row, cells_of_row in enumerate(cells)
            for column, pair in enumerate(cells_of_row)
            if pair and pair.get("significant")
        ),
    )
    return [matrix, listed] if pairs else []


def _pair_cell(pair: Pair | None) -> str:
    if pair is None:
        return ""
    difference = pair["accuracy_difference"]
    mark = ("▲ " if difference > 0 else "▼ ") if pair.get("significant") else ""
    bounds, p = pair.get("interval_95"), pair.get("p_value_holm")
    lines = (
        mark + points(difference),
        f"[{points_interval(bounds)}]".replace(" to ", ", ").replace("+", "") if bounds else "",
        "" if p is None else f"p {_p(p)}",
    )
    return "\n".join(line for line in lines if line)


def _recall_table(comparison: Comparison) -> Table:
    done = [entry for entry in entries_done(comparison) if metrics_of(entry).get("recall")]
    return Table(
        title="Recall by class",
        introduction=(
            "The share of a class's documents that each entry finds. An entry whose classes "
            "differ much here answers some of them too often."
        ),
        header=("", *(entry["id"] for entry in done)),
        rows=tuple(
            (name, *(_optional(percent, metrics_of(entry)["recall"].get(name)) for entry in done))
            for name in comparison["class_names"]
        )
        if done
        else (),
    )


def _out_of_distribution_table(comparison: Comparison) -> Table:
    return Table(
        title="Out-of-distribution detection in numbers",
        introduction="AUROC of each score: 0.5 is chance, 1 tells every document apart.",
        header=("", "Other data set", *OUT_OF_DISTRIBUTION_SCORES.values(), "Documents"),
        rows=tuple(
            (
                f"{entry['id']}  {entry['name']}",
                scores.get("dataset") or UNKNOWN,
                *(_optional(three_decimals, scores.get(key)) for key in OUT_OF_DISTRIBUTION_SCORES),
                _optional(_count, scores.get("num_documents")),
            )
            for entry in comparison["entries"]
            if (scores := entry.get("out_of_distribution"))
        ),
        num_text_columns=2,
    )


def _arms_table(comparison: Comparison) -> Table:
    return Table(
        title="What the arms are",
        introduction=(
            "All read the same documents, cut at the same token. Arms 3 to 5 share a backbone "
            "and isolate the objective; 5 and 6 share the objective and isolate the backbone; 7a "
            "to 7c are the same models and isolate the way a likelihood is estimated."
        ),
        header=("", "Kind", "What it is", "Directories"),
        rows=tuple(
            (
                f"{entry['id']}  {entry['name']}",
                entry["kind"].replace("_", "-"),
                entry.get("description") or UNKNOWN,
                "\n".join(entry.get("directories") or []) or UNKNOWN,
            )
            for entry in comparison["entries"]
        ),
        num_text_columns=3,
    )


def _class_counts_table(comparison: Comparison) -> Table:
    counts: Mapping[str, Any] = comparison.get("class_counts") or {}
    splits = [split for split in ("train", "validation", "test") if counts.get(split)]
    return Table(
        title="Documents by class",
        introduction="Validation is cut from the training split; it fits the calibration.",
        header=("", *(split.capitalize() for split in splits)),
        rows=tuple(
            (f"{index + 1}  {name}", *(f"{counts[split][index]:,}" for split in splits))
            for index, name in enumerate(comparison["class_names"])
        )
        if splits
        else (),
    )


def _recipe_differences_table(comparison: Comparison) -> Table:
    entries = [entry for entry in comparison["entries"] if entry.get("recipe")]
    recipes: list[Mapping[str, Any]] = [entry.get("recipe") or {} for entry in entries]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [
        (key, *(plain_value(recipe[key]) if key in recipe else UNKNOWN for recipe in recipes))
        for key in keys
    ]
    return Table(
        title="Where the recipes differ",
        introduction="What is not listed is the same in every recipe; the recipes follow whole.",
        header=("", *(entry["id"] for entry in entries)),
        rows=tuple(row for row in rows if len(set(row[1:])) > 1),
        num_text_columns=len(entries) + 1,
    )


def _optional(show: Callable[[Any], str], value: object) -> str:
    return UNKNOWN if value is None else show(value)


def _count(count: int) -> str:
    return f"{count:,}"


def _p(p_value: float) -> str:
    return "< 0.0001" if p_value < 0.0001 else f"{p_value:.2g}"
