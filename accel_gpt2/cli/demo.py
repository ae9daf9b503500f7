"""`demo`: the whole way on text that every installation has, in a few minutes on two CPU cores."""

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from accel_gpt2.cli.evaluate import evaluate_and_report, show_metrics
from accel_gpt2.cli.launcher import Launcher, run_launch
from accel_gpt2.cli.options import (
    DebugOption,
    JsonOption,
    QuietOption,
    TrainOptions,
)
from accel_gpt2.cli.output import print_json, say
from accel_gpt2.cli.run_directory import RECIPE_FILE
from accel_gpt2.cli.train import launch_training
from accel_gpt2.errors import ExitCode
from accel_gpt2.recipe import Layer

_REPORT = Path("evaluation", "report.html")

# Two minutes of training on two CPU cores.
_DEMO_RECIPE: Mapping[str, object] = {
    "model": "gpt2-tiny",
    "dataset": "docstrings",
    "train_documents_per_class": 1200,
    "validation_documents": 400,
    "max_length": 64,
    "epochs": 2.0,
}


def demo(
    output_dir: Annotated[Path, typer.Option(help="The run directory.")] = Path("runs/demo"),
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train and evaluate on docstrings: which library is one from?

    What an earlier call has done is not done again.
    """
    metrics, report = run_demo(output_dir, quiet=quiet, debug=debug)
    if json:
        print_json(metrics)
    else:
        show_metrics(metrics)
    say(f"Report: {report}")
    say(
        f'Try it: accel-gpt2 predict {output_dir} "Fit the model to data matrix X and target(s) y."'
    )


def run_demo(
    run_directory: Path, *, quiet: bool, debug: bool, launcher: Launcher = run_launch
) -> tuple[Mapping[str, Any], Path | None]:
    """The metrics of the demo's run, trained and evaluated where that is still to be done.

    Raises:
        UserError: as training and evaluating do.
        typer.Exit: with the trainer's exit code, when it ended before its time.
    """
    done = finished_metrics(run_directory)
    if done is not None:
        say(f"{run_directory} is trained and evaluated already.")
        return done, run_directory / _REPORT
    options = TrainOptions(
        layers=(Layer(origin="demo", values=_DEMO_RECIPE),),
        output_dir=run_directory,
        quiet=quiet,
        debug=debug,
    )
    code = launch_training(options, launcher)
    if code != ExitCode.DONE:
        raise typer.Exit(code)
    return evaluate_and_report(run_directory, dataset=None, split=None, quiet=quiet)


def finished_metrics(run_directory: Path) -> Mapping[str, Any] | None:
    """The metrics of a run whose evaluation and report are newer than all that was trained."""
    metrics_path = run_directory / "evaluation" / "metrics.json"
    finals = list(run_directory.glob("class-*/final"))
    if not (metrics_path.is_file() and (run_directory / _REPORT).is_file() and finals):
        return None
    evaluated = metrics_path.stat().st_mtime
    if any(path.stat().st_mtime > evaluated for path in (*finals, run_directory / RECIPE_FILE)):
        return None
    try:
        metrics: Mapping[str, Any] = json_module.loads(metrics_path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return metrics
