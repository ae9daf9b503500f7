"""One self-contained HTML page about a comparison, and the PNGs that stand on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_gpt2.report import comparison_plots as plots
from accel_gpt2.report.comparison_form import (
    Comparison,
    Entry,
    entries_done,
    metrics_of,
    read_comparison,
)
from accel_gpt2.report.comparison_tables import (
    OUT_OF_DISTRIBUTION_SCORES,
    background_tables,
    result_tables,
)
from accel_gpt2.report.elements import FigureOnPage, draw_figure, plain_items, render


def write_comparison_report(directory: Path) -> Path:
    """Write report.html and its PNGs beside comparison.json, and return the page's path.

    The page needs no other file and no network.

    Raises:
        UserError: when the directory holds no comparison.json, or it is damaged.
    """
    comparison = read_comparison(directory)
    figures = _figures(comparison)
    for figure in figures:
        (directory / figure.file_name).write_bytes(figure.light_png)
    page = directory / "report.html"
    page.write_text(render_comparison(comparison, figures), encoding="utf-8")
    return page


def render_comparison(comparison: Comparison, figures: Sequence[FigureOnPage]) -> str:
    """The page as HTML text; all text from the comparison is escaped."""
    entries = comparison["entries"]
    done = entries_done(comparison)
    titles = {entry["id"]: f"{entry['id']}  {entry['name']}" for entry in entries}
    return render(
        "comparison.html.j2",
        name=f"Classifiers compared on {comparison['dataset']}",
        subtitle=_subtitle(comparison),
        verdict=comparison.get("verdict") or ["No arm is done yet."],
        alarms=[
            {
                "title": _alarm_title(alarm),
                "what": alarm["what"],
                "cause": alarm.get("cause"),
                "next": alarm.get("next"),
            }
            for alarm in comparison.get("alarms") or []
        ],
        missing=[
            (titles[entry["id"]], entry.get("why_missing") or "It has not been run yet.")
            for entry in entries
            if entry not in done
        ],
        tables_above=result_tables(comparison),
        figures=figures,
        tables_below=background_tables(comparison),
        recipes=[
            (titles[entry["id"]], plain_items(recipe))
            for entry in entries
            if (recipe := entry.get("recipe"))
        ],
        command=comparison.get("command"),
        environment=plain_items(comparison.get("environment") or {}),
    )


def _subtitle(comparison: Comparison) -> str:
    documents, truncated = comparison.get("num_documents"), comparison.get("truncated_documents")
    max_length, seeds = comparison.get("max_length"), comparison.get("seeds") or []
    parts = (
        f"{documents:,} {comparison.get('split') or 'test'} documents" if documents else None,
        f"{len(comparison['class_names'])} classes",
        f"at most {max_length:,} tokens each" if max_length else None,
        f"{truncated:,} cut there" if truncated and max_length else None,
        f"{len(seeds)} seeds" if len(seeds) > 1 else None,
        comparison.get("date"),
    )
    return " · ".join(part for part in parts if part)


def _alarm_title(alarm: Mapping[str, Any]) -> str:
    kind = alarm["kind"].replace("_", " ").capitalize()
    return f"{kind}: {', '.join(alarm['entries'])}" if alarm.get("entries") else kind


# The figures.


def _figures(comparison: Comparison) -> list[FigureOnPage]:
    """Those of which something is known, in the order in which they are read."""
    looks = plots.entry_looks(comparison["entries"])
    done = [_Shown(entry=entry, look=looks[entry["id"]]) for entry in entries_done(comparison)]
    makers = (
        _accuracy_figure,
        _training_documents_figure,
        _tokens_read_figure,
        _reliability_figure,
        _log_ratios_figure,
        _bits_per_byte_figure,
        _risk_coverage_figure,
        _out_of_distribution_figure,
    )
    figures = (make(done, comparison) for make in makers)
    return [figure for figure in figures if figure]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """A done entry and how it is drawn."""

    entry: Entry
    look: plots.Look

    @property
    def metrics(self) -> Mapping[str, Any]:
        return metrics_of(self.entry)

    @property
    def seed_accuracies(self) -> list[float]:
        by_seed: Mapping[str, Any] = self.entry.get("by_seed") or {}
        return _known(by_seed.get("accuracy") or [])

    def curve(self, name: str) -> Sequence[Mapping[str, Any]]:
        curves: Mapping[str, Any] = self.entry.get("curves") or {}
        return curves.get(name) or []


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _accuracy_figure(done: Sequence[_Shown], comparison: Comparison) -> FigureOnPage | None:
    if not done:
        return None
    dots = [
        plots.Dot(
            look=shown.look,
            accuracy=shown.metrics["accuracy"],
            interval=shown.metrics.get("accuracy_interval_95"),
            seeds=shown.seed_accuracies if len(shown.seed_accuracies) > 1 else [],
        )
        for shown in done
    ]
    majorities = _known([shown.metrics.get("majority_class_accuracy") for shown in done])
    several = any(dot.seeds for dot in dots)
    return draw_figure(
        lambda theme: plots.accuracy_dots(dots, majorities[0] if majorities else None, theme),
        file_name="accuracy.png",
        title="Accuracy",
        caption=(
            "The bar is the 95% interval: how far another draw of test documents would move the "
            "dot. "
            + (
                "The small circles below it are the seeds: how far another training moves it. "
                if several
                else ""
            )
            + "Overlapping bars may still differ significantly, because all entries classify the "
            "same documents; “Every pair” has that test."
        ),
        description="Accuracy of every entry with its 95% interval: "
        + "; ".join(f"{dot.look.label} {dot.accuracy:.1%}" for dot in dots),
    )


def _training_documents_figure(
    done: Sequence[_Shown], comparison: Comparison
) -> FigureOnPage | None:
    lines = []
    for shown in done:
        points = [
            (point["documents_per_class"], _known(point["accuracy"]))
            for point in shown.curve("training_documents")
        ]
        points = sorted((x, accuracies) for x, accuracies in points if accuracies)
        if points:
            accuracies = [values for _, values in points]
            lines.append(
                plots.Line(
                    look=shown.look,
                    x=[x for x, _ in points],
                    y=[sum(values) / len(values) for values in accuracies],
                    low=[min(values) for values in accuracies],
                    high=[max(values) for values in accuracies],
                )
            )
    return _lines_figure(
        lines,
        x_label="training documents of each class",
        y_label="accuracy",
        file_name="training_documents.png",
        title="Accuracy against training documents",
        caption=(
            "The mean over seeds, and a band from the lowest to the highest. Where two lines "
            "cross, the better classifier depends on how much text there is: Ng and Jordan "
            "(2002) expect generative ones ahead on the left. The last point is the whole "
            "training split."
        ),
    )


def _tokens_read_figure(done: Sequence[_Shown], comparison: Comparison) -> FigureOnPage | None:
    lines = []
    for shown in done:
        points = sorted(shown.curve("tokens_read"), key=lambda point: point["tokens"])
        if points:
            bounds = [point.get("interval_95") or [point["accuracy"]] * 2 for point in points]
            lines.append(
                plots.Line(
                    look=shown.look,
                    x=[point["tokens"] for point in points],
                    y=[point["accuracy"] for point in points],
                    low=[low for low, _ in bounds],
                    high=[high for _, high in bounds],
                )
            )
    return _lines_figure(
        lines,
        x_label="document tokens read",
        y_label="accuracy",
        file_name="tokens_read.png",
        title="Accuracy against tokens read",
        caption=(
            "A causal language model has an answer after every token. Where its line is flat, "
            "reading on changes nothing; where it falls, later tokens mislead. The band is the "
            "95% interval."
        ),
    )


def _risk_coverage_figure(done: Sequence[_Shown], comparison: Comparison) -> FigureOnPage | None:
    lines = []
    for shown in done:
        points = sorted(shown.curve("risk_coverage"), key=lambda point: point["coverage"])
        if points:
            risks = [point["risk"] for point in points]
            lines.append(
                plots.Line(
                    look=shown.look,
                    x=[point["coverage"] for point in points],
                    y=risks,
                    low=risks,
                    high=risks,
                )
            )
    return _lines_figure(
        lines,
        logarithmic=False,
        x_label="coverage: share of documents that are answered, the surest first",
        y_label="risk: share of them that is wrong",
        file_name="risk_coverage.png",
        title="Risk against coverage",
        caption=(
            "What declining to answer buys. A line that falls steeply to the left belongs to a "
            "classifier that knows which answers are wrong; at the right end stands its error."
        ),
    )


def _lines_figure(
    lines: Sequence[plots.Line],
    *,
    x_label: str,
    y_label: str,
    file_name: str,
    title: str,
    caption: str,
    logarithmic: bool = True,
) -> FigureOnPage | None:
    if not lines:
        return None
    return draw_figure(
        lambda theme: plots.share_lines(
            lines, theme, x_label=x_label, y_label=y_label, logarithmic=logarithmic
        ),
        file_name=file_name,
        title=title,
        caption=caption,
        description=f"{y_label.partition(':')[0].capitalize()} over {x_label.partition(':')[0]}. "
        "At the right end: " + "; ".join(f"{line.look.label} {line.y[-1]:.1%}" for line in lines),
    )


def _reliability_figure(done: Sequence[_Shown], comparison: Comparison) -> FigureOnPage | None:
    panels = []
    for shown in done:
        raw, calibrated = (
            (shown.metrics.get(kind) or {}).get("reliability") or []
            for kind in ("raw", "calibrated")
        )
        if raw or calibrated:
            panels.append((shown.look, raw, calibrated))
    if not panels:
        return None
    return draw_figure(
        lambda theme: plots.reliability_panels(panels, theme),
        file_name="reliability.png",
        title="Reliability",
        caption=(
            "On the dashed line a probability is what it says; below it, it promises too much. "
            "Raw probabilities of language models count every token as independent evidence and "
            "crowd at 1; calibration on validation documents should bring them to the line."
        ),
        description="Share of right answers by stated probability, raw and calibrated, in a panel "
        "for each entry.",
    )


def _log_ratios_figure(done: Sequence[_Shown], comparison: Comparison) -> FigureOnPage | None:
    panels = [
        (shown.look, ratios["edges"], ratios["counts"])
        for shown in done
        if (ratios := shown.entry.get("log_ratios"))
    ]
    names = comparison["class_names"]
    if not panels:
        return None
    return draw_figure(
        lambda theme: plots.log_ratio_panels(panels, names, theme),
        file_name="log_ratios.png",
        title="Log-ratios",
        caption=(
            "How far each document's true class is ahead of the best other one: right of the line "
            "at 0 the answer is right, but for the prior. Of entries with a head it is the ratio "
            "of probabilities. Each panel has its own scale. A hump at 0 is a model that cannot "
            "tell; one class left of another is favoured less."
            + (" All classes together." if len(names) > plots.MOST_RIDGES else "")
        ),
        description="Histograms of the log-ratio of the true class to the best other one, in a "
        "panel for each entry.",
    )


def _bits_per_byte_figure(done: Sequence[_Shown], comparison: Comparison) -> FigureOnPage | None:
    panels = [
        (shown.look, matrix) for shown in done if (matrix := shown.metrics.get("bits_per_byte"))
    ]
    names = comparison["class_names"]
    if not panels:
        return None
    return draw_figure(
        lambda theme: plots.bits_per_byte_panels(panels, names, theme),
        file_name="bits_per_byte.png",
        title="Bits per byte, class by class",
        caption=(
            "Rows are documents, columns are models; framed is the lowest value of each row, which "
            "should be the diagonal: a class's own model should compress its documents best. The "
            "colour of the others is what the classification lives on."
            + (
                " Classes are numbered as in “Documents by class”."
                if len(names) > plots.MOST_ANNOTATED_CLASSES
                else ""
            )
        ),
        description="Bits per byte of each class's documents under each class's model, in a panel "
        "for each entry.",
    )


def _out_of_distribution_figure(
    done: Sequence[_Shown], comparison: Comparison
) -> FigureOnPage | None:
    rows = []
    for shown in done:
        scores: Mapping[str, Any] = shown.entry.get("out_of_distribution") or {}
        aurocs = {name: scores.get(key) for key, name in OUT_OF_DISTRIBUTION_SCORES.items()}
        if any(auroc is not None for auroc in aurocs.values()):
            rows.append((shown.look, aurocs))
    if not rows:
        return None
    others = dict.fromkeys(
        (shown.entry.get("out_of_distribution") or {}).get("dataset") for shown in done
    )
    return draw_figure(
        lambda theme: plots.out_of_distribution_dots(rows, theme),
        file_name="out_of_distribution.png",
        title="Out-of-distribution detection",
        caption=(
            "How well a score tells the test documents from those of "
            f"{' and '.join(other for other in others if other) or 'another data set'}: the "
            "likelihood log Σ p(x|c) p(c), the same per token, and the largest class probability. "
            "0.5 is chance; below it, the score takes the other documents for its own (short "
            "documents have high likelihoods)."
        ),
        description="AUROC of three out-of-distribution scores for every entry.",
    )
