"""`evaluate`: score held-out documents, compare with the baseline, write the report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from accel_gpt2.cli.errors import plain_app, run
from accel_gpt2.cli.options import DebugOption, JsonOption, QuietOption, RunArgument
from accel_gpt2.cli.output import is_main_process, print_json, print_table, say
from accel_gpt2.cli.run_directory import RECIPE_FILE, require_run
from accel_gpt2.errors import UsageError
from accel_gpt2.recipe import Pll
from accel_gpt2.recipe.layers import read_layer
from accel_gpt2.recipe.resolving import resolve

# Accuracy that calibration changes by less is noise on most test splits.
_WORTH_SAYING = 0.01


def evaluate(
    run_directory: RunArgument,
    dataset: Annotated[
        str | None,
        typer.Option(help="Another data set with the same classes. [default: the run's own]"),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="The split whose documents are scored. [default: the recipe's test split]"
        ),
    ] = None,
    pll: Annotated[
        Pll,
        typer.Option(
            help="How masked language models score: each token masked alone, or random masks that "
            "all classes share or draw for themselves."
        ),
    ] = "full",
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Classify the test documents, and compare with a baseline.

    Writes evaluation/ with scores, metrics and the report into the run directory. Scores that are
    there already are not computed again.
    """
    metrics, report = evaluate_and_report(
        run_directory, dataset=dataset, split=split, pll=pll, quiet=quiet
    )
    if not is_main_process():
        return
    if json:
        print_json(metrics)
    else:
        show_metrics(metrics)
    if report is not None:
        say(f"Report: {report}")


def _say_what_calibration_changes(metrics: Mapping[str, Any]) -> None:
    calibrated = (metrics.get("calibrated") or {}).get("accuracy")
    if calibrated is not None and abs(calibrated - metrics["accuracy"]) >= _WORTH_SAYING:
        say(
            f"With calibrated probabilities the accuracy is {calibrated:.3f}: some classes' models "
            "have learnt more than others', which calibration takes out and Bayes' rule alone "
            "does not."
        )


def evaluate_and_report(
    run_directory: Path,
    *,
    dataset: str | None,
    split: str | None,
    pll: Pll = "full",
    quiet: bool,
) -> tuple[Mapping[str, Any], Path | None]:
    """The metrics, and where the report is; other documents than the run's own and estimates of
    likelihoods have none.

    Raises:
        UserError: when the path is no run directory, the run has no trained models, or the data is
            not to be had.
    """
    require_run(run_directory)
    for option, name in (("--dataset", dataset), ("--split", split)):
        if name is not None and not name.strip():
            raise UsageError(
                f"{option} {name!r}: a name is needed; leave it out for the run's own."
            )
    from accel_gpt2.classify.evaluate import evaluate_run

    metrics = evaluate_run(run_directory, dataset=dataset, split=split, pll=pll, quiet=quiet)
    recipe = resolve([read_layer(run_directory / RECIPE_FILE)]).recipe
    own = (metrics["dataset"], metrics["split"]) == (recipe.dataset, recipe.test_split)
    if not (own and pll == "full" and is_main_process()):
        return metrics, None
    from accel_gpt2.report import write_report

    return metrics, write_report(run_directory)


def show_metrics(metrics: Mapping[str, Any]) -> None:
    """Data: the accuracy table, with the baseline and the majority class beside the classifier."""
    baseline = metrics.get("baseline") or {}
    print_table(
        {
            "": "left",
            "accuracy": "right",
            "95% CI": "right",
            "macro-F1": "right",
            "NLL": "right",
            "ECE": "right",
        },
        [
            _row(_name(metrics), {**metrics, **_calibration_metrics(metrics)}),
            _row(str(baseline.get("name") or "TF-IDF + LR"), baseline),
            _row("majority class", {"accuracy": metrics.get("majority_class_accuracy")}),
        ],
    )
    _say_what_calibration_changes(metrics)


def _name(metrics: Mapping[str, Any]) -> str:
    way = "with a head" if metrics.get("objective") == "classification" else "per class"
    return f"{metrics.get('model') or 'GPT-2'} {way}"


def _calibration_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    calibrated = metrics.get("calibrated") or {}
    return {key: calibrated.get(key) for key in ("nll", "ece")}


def _row(name: str, values: Mapping[str, Any]) -> list[str]:
    interval = values.get("accuracy_interval_95")
    return [
        name,
        _number(values.get("accuracy")),
        "" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}",
        _number(values.get("macro_f1")),
        _number(values.get("nll")),
        _number(values.get("ece")),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def launched_main() -> None:
    """The whole of `launch/evaluate.py`."""
    app = plain_app()
    app.command()(evaluate)
    run(app)
