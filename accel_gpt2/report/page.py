"""One self-contained HTML page about a run, and the PNGs that stand on it."""

import dataclasses
import itertools
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accel_gpt2.report import plots
from accel_gpt2.report.elements import (
    UNKNOWN,
    FigureOnPage,
    Table,
    draw_figure,
    format_p_value,
    percent,
    percent_interval,
    plain_items,
    points_interval,
    render,
    three_decimals,
    three_decimals_interval,
    three_digits,
    treatments_table,
)
from accel_gpt2.report.read import Run, read_run
from accel_gpt2.units import format_bytes, format_count, format_seconds

# What was trained, by the recipe's objective.
_TRAINED = {
    "generative": "One {model} model per class",
    "masked_lm": "One masked {model} model per class",
    "hybrid": "One {model} model per class, trained together with a discriminative term,",
    "classification": "{model} with a classification head",
}


def write_report(run_directory: Path, *, notices: Sequence[str] = ()) -> Path:
    """Write evaluation/report.html and its PNGs, and return the page's path.

    The page needs no other file and no network. A run without an evaluation gets its loss curves
    and the command that evaluates it.

    Args:
        notices: what is said above everything else.

    Raises:
        UserError: when the directory is not that of a run, or its metrics.json is damaged.
    """
    run = read_run(run_directory)
    run = dataclasses.replace(run, notices=(*notices, *run.notices))
    figures = _figures(run)
    folder = run_directory / "evaluation"
    folder.mkdir(exist_ok=True)
    for figure in figures:
        (folder / figure.file_name).write_bytes(figure.light_png)
    page = folder / "report.html"
    page.write_text(render_page(run, figures), encoding="utf-8")
    return page


def render_page(run: Run, figures: Sequence[FigureOnPage]) -> str:
    """The page as HTML text; all text from the run is escaped."""
    metrics = run.metrics or {}
    model = metrics.get("model") or run.recipe.get("model")
    num_parameters = run.plan.get("num_parameters")
    size = f"{format_count(num_parameters)} parameters" if num_parameters else None
    if size and run.objective not in {"classification", "unconditional"}:
        size += " per class"
    dataset = metrics.get("dataset") or run.recipe.get("dataset")
    return render(
        "run.html.j2",
        name=run.directory.resolve().name,
        subtitle=" · ".join(str(x) for x in (model, size, dataset, metrics.get("split")) if x),
        verdict=_verdict(run),
        next_command=None
        if run.metrics or run.objective == "unconditional"
        else f"accel-gpt2 evaluate {shlex.quote(str(run.directory))}",
        notices=run.notices,
        tables_above=[table for table in (_metrics_table(run),) if table],
        figures=figures,
        tables_below=[
            table
            for table in (
                _class_table(run),
                _mistakes_table(run),
                treatments_table(
                    metrics.get("data_treatments") or run.plan.get("data_treatments") or []
                ),
            )
            if table
        ],
        command=run.command,
        recipe=plain_items(run.recipe),
        environment=plain_items(run.environment),
    )


# The verdict.


def _verdict(run: Run) -> list[str]:
    """The outcome in sentences, the most important one first."""
    if run.metrics is None:
        return _verdict_without_evaluation(run)
    metrics = run.metrics
    return [
        _accuracy_sentence(run, metrics),
        *_baseline_sentences(metrics),
        *_majority_sentence(metrics),
        *_training_sentences(metrics.get("training") or {}),
    ]


def _verdict_without_evaluation(run: Run) -> list[str]:
    if run.objective == "unconditional":
        return [
            "A language model of all classes, on which adapters are trained. It is no classifier, "
            "so there is nothing to evaluate."
        ]
    if not run.curves:
        return [
            "No training step has been logged yet. When the training has ended, this command "
            "classifies the test documents:"
        ]
    steps = max(curve.num_steps for curve in run.curves)
    models = "model has" if len(run.curves) == 1 else "models have"
    return [
        f"{len(run.curves)} {models} been trained, for {steps:,} steps at most; no test "
        "document has been classified yet. This command does that:"
    ]


def _accuracy_sentence(run: Run, metrics: Mapping[str, Any]) -> str:
    model = metrics.get("model") or run.recipe.get("model") or "language"
    documents = metrics.get("num_documents")
    of_what = f"{documents:,} {metrics.get('split') or 'test'} documents" if documents else "them"
    trained = _TRAINED.get(run.objective, _TRAINED["generative"]).format(model=model)
    return (
        f"{trained} gets {percent(metrics['accuracy'])} of {of_what} right"
        f"{_interval(metrics.get('accuracy_interval_95'))}."
    )


def _baseline_sentences(metrics: Mapping[str, Any]) -> list[str]:
    baseline = metrics.get("baseline") or {}
    if "accuracy" not in baseline:
        return []
    name = baseline.get("name") or "the baseline"
    first = (
        f"The baseline, {name}, gets {percent(baseline['accuracy'])} right"
        f"{_interval(baseline.get('accuracy_interval_95'))}"
    )
    points = 100 * (metrics["accuracy"] - baseline["accuracy"])
    bounds = baseline.get("accuracy_difference_interval_95")
    between = f" (95% interval {points_interval(bounds)})" if bounds else ""
    side = "ahead of" if points > 0 else "behind"
    distance = (
        f"this run is {abs(points):.1f} points {side} it"
        if round(abs(points), 1)
        else "this run is level with it"
    )
    sentences = [f"{first}; {distance}{between}."]
    test = baseline.get("mcnemar") or {}
    if test.get("p_value") is not None:
        p_value = test["p_value"]
        verdict = (
            "This difference is significant"
            if p_value < 0.05
            else "This difference may well be chance"
        )
        sentences.append(
            f"{verdict} (McNemar's exact test, {format_p_value(p_value)}: {test['only_a']:,} "
            f"documents that only this run gets right, {test['only_b']:,} that only the baseline "
            "does)."
        )
    return sentences


def _majority_sentence(metrics: Mapping[str, Any]) -> list[str]:
    majority = metrics.get("majority_class_accuracy")
    if majority is None:
        return []
    return [f"Always answering the most frequent class would get {percent(majority)} right."]


def _training_sentences(training: Mapping[str, Any]) -> list[str]:
    if training.get("seconds") is None:
        return []
    tokens = training.get("document_tokens")
    over = f" for {format_count(tokens)} document tokens" if tokens else ""
    cost = training.get("cost_usd")
    price = (
        f" and cost ${cost:,.2f}"
        if cost is not None
        else "; its cost is unknown, because no price_usd_per_hour was set"
    )
    return [f"Training took {format_seconds(training['seconds'])}{over}{price}."]


# The tables.


def _metrics_table(run: Run) -> Table | None:
    if run.metrics is None:
        return None
    metrics = run.metrics
    training = metrics.get("training") or {}
    baseline = metrics.get("baseline") or {}
    columns = (
        {**(metrics.get("raw") or {}), **training, **metrics},
        metrics.get("calibrated") or {},
        baseline,
    )
    lines: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("Accuracy", "accuracy", percent),
        ("95% interval of the accuracy", "accuracy_interval_95", percent_interval),
        ("Macro-F1", "macro_f1", three_decimals),
        ("95% interval of macro-F1", "macro_f1_interval_95", three_decimals_interval),
        ("AUROC, one against rest", "auroc", three_decimals),
        ("Negative log-likelihood, nats", "nll", three_decimals),
        ("Brier score, 0 to 2", "brier", three_decimals),
        ("Expected calibration error", "ece", three_decimals),
        ("Training time", "seconds", format_seconds),
        ("Training speed, document tokens/s", "tokens_per_second", format_count),
        ("Peak memory", "peak_memory_bytes", format_bytes),
        ("Classification speed, documents/s", "documents_per_second", three_digits),
    )
    rows = [
        (name, *(UNKNOWN if column.get(key) is None else show(column[key]) for column in columns))
        for name, key, show in lines
    ]
    truncated = metrics.get("truncated_documents")
    description = baseline.get("description")
    return Table(
        title="Results",
        introduction=(
            f"“Raw” is {_raw(run)}; “calibrated” also uses the temperature, length slope and class "
            "bias fitted on validation documents. Lower is better from the negative log-likelihood "
            "to the calibration error."
            + (
                f" {truncated:,} documents were longer than max_length and are scored up to there."
                if truncated
                else ""
            )
            + (f" The baseline: {description}." if description else "")
        ),
        header=("", "Raw", "Calibrated", str(baseline.get("name") or "Baseline")),
        rows=tuple(row for row in rows if any(value != UNKNOWN for value in row[1:])),
    )


def _raw(run: Run) -> str:
    if run.objective == "classification":
        return "what the classification head says"
    return "Bayes' rule on the summed log-likelihoods"


def _class_table(run: Run) -> Table | None:
    metrics = run.metrics or {}
    curves = {curve.class_name: curve for curve in run.curves}
    classes = metrics.get("class_names") or run.plan.get("class_names") or []
    # A model of all classes has a row of its own.
    names = list(dict.fromkeys([*map(str, classes), *curves]))
    if not names:
        return None
    num_documents = {
        name: f"{sum(row):,}"
        for name, row in zip(names, metrics.get("confusion_matrix") or [], strict=False)
    }

    def rates(key: str, name: str) -> str:
        value = (metrics.get(key) or {}).get(name)
        return UNKNOWN if value is None else percent(value)

    rows = []
    for name in names:
        curve = curves.get(name)
        best = curve.best if curve else None
        rows.append(
            (
                name,
                num_documents.get(name, UNKNOWN),
                rates("recall", name),
                rates("precision", name),
                rates("f1", name),
                f"{best.bits:.3f}" if best else UNKNOWN,
                f"{best.bits_per_byte:.3f}" if best and best.bits_per_byte else UNKNOWN,
                f"{best.step:,}" if best else UNKNOWN,
                f"{curve.num_steps:,}" if curve else UNKNOWN,
                format_count(curve.num_tokens) if curve and curve.num_tokens else UNKNOWN,
            )
        )
    header = (
        "Class",
        "Test documents",
        "Recall",
        "Precision",
        "F1",
        f"Bits per {run.curves[0].unit if run.curves else 'token'}",
        "Bits per byte",
        "Best step",
        "Steps",
        "Tokens trained",
    )
    known = [any(row[column] != UNKNOWN for row in rows) for column in range(len(header))]
    return Table(
        title="Classes",
        introduction=(
            "Bits are those of the validation documents under the model that was trained for them, "
            "at the best step, which is the checkpoint that classifies."
        ),
        header=tuple(itertools.compress(header, known)),
        rows=tuple(tuple(itertools.compress(row, known)) for row in rows),
    )


def _mistakes_table(run: Run) -> Table | None:
    if run.metrics is None or not run.mistakes:
        return None
    names = [str(name) for name in run.metrics["class_names"]]
    return Table(
        title="Surest mistakes",
        introduction=(
            "The wrong answers with the largest log-likelihood of the predicted class over that of "
            "the label. Read these documents first (rows count from 0): wrong labels and odd "
            "texts gather here."
        ),
        header=("Label", "Prediction", "Row of the source", "Nats apart", "Tokens"),
        rows=tuple(
            (
                names[mistake.label],
                names[mistake.prediction],
                f"{mistake.document}",
                f"{mistake.margin_nats:.1f}",
                f"{mistake.num_tokens:,}",
            )
            for mistake in run.mistakes
        ),
        num_text_columns=2,
    )


# The figures.


def _figures(run: Run) -> list[FigureOnPage]:
    figures = []
    if run.curves:
        figures.append(
            draw_figure(
                lambda theme: plots.loss_curves(run.curves, theme),
                file_name="loss_curves.png",
                title="Loss curves",
                caption=(
                    "Look for validation that still falls at the end (train longer) or rises while "
                    "training falls (overfitting: the star marks the checkpoint that is used). "
                    "Training is measured with dropout, so it may lie above validation."
                    + (
                        " Its loss has the discriminative term in it; validation has not."
                        if run.objective == "hybrid"
                        else ""
                    )
                ),
                description="Training loss and validation bits of each model over steps.",
            )
        )
    metrics = run.metrics
    if metrics is None:
        return figures
    names = [str(name) for name in metrics["class_names"]]
    figures.append(
        draw_figure(
            lambda theme: plots.confusion_matrix(metrics["confusion_matrix"], names, theme),
            file_name="confusion_matrix.png",
            title="Confusion matrix",
            caption=(
                "Each row is the documents of one class, and its shares add up to 100%. Look for "
                "coloured cells off the diagonal: pairs of classes that are taken for one another. "
                "A column of them is a class that is answered too often."
            ),
            description="Number and share of documents by true and predicted class.",
        )
    )
    blocks = {
        kind: metrics[kind]["reliability"]
        for kind in ("raw", "calibrated")
        if (metrics.get(kind) or {}).get("reliability")
    }
    if blocks:
        figures.append(
            draw_figure(
                lambda theme: plots.reliability_diagram(blocks, theme),
                file_name="reliability_diagram.png",
                title="Reliability diagram",
                caption=_reliability_caption(run, metrics),
                description="Share of right answers by stated probability, raw and calibrated.",
            )
        )
    if metrics.get("bits_per_byte"):
        figures.append(
            draw_figure(
                lambda theme: plots.bits_per_byte_heatmap(metrics["bits_per_byte"], names, theme),
                file_name="bits_per_byte.png",
                title="Bits per byte, class by class",
                caption=_bits_per_byte_caption(metrics["bits_per_byte"], names),
                description="Bits per byte of each class's documents under each class's model.",
            )
        )
    return figures


def _reliability_caption(run: Run, metrics: Mapping[str, Any]) -> str:
    scale = (metrics.get("calibration") or {}).get("scale")
    crowding = (
        ""
        if run.objective == "classification"
        else ": raw probabilities crowd at 1, because a document's tokens are counted as "
        "independent evidence"
    )
    scaling = f" Calibration multiplies the scores by {scale:.3g}." if scale is not None else ""
    return (
        "A point below the dashed line is a probability that promises too much; points of few "
        "documents scatter. The bars count the documents of each bin, on a logarithmic scale"
        f"{crowding}.{scaling}"
    )


def _bits_per_byte_caption(matrix: Sequence[Sequence[float | None]], names: Sequence[str]) -> str:
    exceptions = []
    for index, row in enumerate(matrix):
        values = [math.inf if x is None or math.isnan(x) else x for x in row]
        if min(values) < values[index]:
            exceptions.append(names[index])
    outcome = (
        "It is, in every row."
        if not exceptions
        else f"It is not for {', '.join(exceptions)}: another class's model predicts these "
        "documents better."
    )
    return (
        "The diagonal should be the lowest value of each row (framed): a class's own model should "
        f"compress its documents best. {outcome} The distance to the next value in the row is "
        "what the classification lives on."
    )


def _interval(bounds: Sequence[float] | None) -> str:
    return f" (95% interval {percent_interval(bounds)})" if bounds else ""
