"""A comparison at work: its runs are trained and evaluated one after another."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from accel_gpt2.classify.lock import hold
from accel_gpt2.classify.status import read_ending
from accel_gpt2.cli.comparison_runs import PreparedComparison, PreparedRun
from accel_gpt2.cli.errors import report
from accel_gpt2.cli.launcher import Launcher, run_launch
from accel_gpt2.cli.output import say, warn
from accel_gpt2.cli.train import launch_training
from accel_gpt2.errors import ExitCode, StoppedEarly, UserError
from accel_gpt2.failures import mark_as_told

if TYPE_CHECKING:
    from accel_gpt2.classify.comparison import Comparison

# Drawing the pictures takes seconds, some of them in dark too.
_REPORT_EVERY_SECONDS = 60.0

# A trainer that ends so was told to: the comparison ends too, and goes on when it is started again.
_STOPS = (ExitCode.STOPPED, ExitCode.LIMIT_REACHED, ExitCode.INTERRUPTED)


def run_comparison(
    prepared: PreparedComparison,
    *,
    command: str,
    launcher: Launcher = run_launch,
    write_report: Callable[[Path], object] | None = None,
) -> tuple[dict[str, Any], int]:
    """Do what is left to do; returns comparison.json's content, and the exit code.

    comparison.json is written after every run, and report.html at the end, when a trainer is
    stopped, and once a minute, so what is left at any moment can be read.

    Args:
        write_report: what draws report.html from comparison.json; None for the real one.

    Raises:
        UserError: when no arm can run here, or as a start of `train` or `evaluate` does.
        typer.Exit: with the trainer's exit code, when it was stopped.
        StoppedEarly: when it was stopped before it began.
    """
    missing = {run.planned.directory: run.cannot for run in prepared.runs if run.cannot}
    possible = [run for run in prepared.runs if not run.cannot]
    for reason, arms in _by_reason(prepared.runs).items():
        warn(f"Not run: {', '.join(arms)}. {reason}")
    if not any(run.planned.arms for run in possible):
        raise UserError("None of these arms can run here; the reasons are above.")

    from accel_gpt2.classify.comparison import Comparison, describe_data, write_comparison
    from accel_gpt2.report.comparison import write_comparison_report

    write_report = write_report or write_comparison_report
    quiet = prepared.runs[0].options.quiet
    code = int(ExitCode.DONE)
    with hold(prepared.directory):
        comparison = Comparison(
            directory=prepared.directory,
            runs=tuple(run.planned for run in prepared.runs),
            recipe=prepared.recipe,
            encoder=prepared.encoder,
            command=command,
            data=describe_data(prepared.recipe, progress=not quiet),
            other_dataset=prepared.other_dataset,
        )

        possible = _without_full_runs(possible, max(comparison.data["class_counts"]["train"]))
        drawn = time.monotonic()
        document = write_comparison(comparison, missing=missing)
        try:
            for number, run in enumerate(possible, 1):
                say(f"[{number}/{len(possible)}] {_words(run, comparison)}", style="bold")
                if run.is_done:
                    continue
                try:
                    if run.planned.base in missing:
                        raise UserError(f"Its base is missing: {missing[run.planned.base]}")
                    _train(run, launcher)
                    _evaluate(run, comparison)
                except UserError as error:
                    failed = report(error)
                    code = code or failed
                    missing[run.planned.directory] = str(error)
                document = write_comparison(comparison, missing=missing)
                if time.monotonic() - drawn > _REPORT_EVERY_SECONDS:
                    write_report(prepared.directory)
                    drawn = time.monotonic()
        except (typer.Exit, StoppedEarly):
            write_report(prepared.directory)
            raise
        write_report(prepared.directory)
    return document, code


def _without_full_runs(runs: Sequence[PreparedRun], most_documents: int) -> list[PreparedRun]:
    """Leave out points of the learning curve that have all the documents that there are."""
    asked = {run.planned.documents_per_class or 0 for run in runs}
    for documents in sorted(x for x in asked if x >= most_documents):
        warn(
            f"--train-documents {documents}: no class has more than {most_documents:,} training "
            "documents, so that is the full run, which is there anyway."
        )
    return [run for run in runs if (run.planned.documents_per_class or 0) < most_documents]


def _by_reason(runs: Sequence[PreparedRun]) -> dict[str, list[str]]:
    """The ids of entries that cannot run here, by the reason."""
    reasons: dict[str, list[str]] = {}
    for run in runs:
        if run.cannot and run.planned.is_main:
            reasons.setdefault(run.cannot, []).extend(arm.id for arm in run.planned.arms)
    return reasons


def _words(run: PreparedRun, comparison: "Comparison") -> str:
    """Which run this is, and what is left to do."""
    planned = run.planned
    name = f"{run.recipe.model} on all text, the base of LoRA"
    if len(planned.arms) == 1:
        name = comparison.words(planned.arms[0], planned.arms[0].name)
    elif planned.arms:
        name = f"{run.recipe.model}, {run.recipe.objective}"
    ids = ", ".join(arm.id for arm in planned.arms)
    which = f"{f'{ids} ' if ids else ''}{name}, seed {planned.seed}"
    if planned.documents_per_class is not None:
        which += f", {planned.documents_per_class} documents per class"
    return f"{which}: {run.outlook}"


def _train(run: PreparedRun, launcher: Launcher) -> None:
    """Raises typer.Exit for a trainer that was stopped, UserError for one that failed."""
    if run.is_trained:
        return
    code = launch_training(run.options, launcher)
    if code in _STOPS:
        raise typer.Exit(code)
    if code != ExitCode.DONE:
        error = UserError(_last_words(run.directory) or f"Its training ended with code {code}.")
        error.exit_code = ExitCode(code)
        mark_as_told(error)  # by the launcher
        raise error


def _last_words(run_directory: Path) -> str:
    with contextlib.suppress(UserError):
        if ending := read_ending(run_directory):
            return ending[1]
    return ""


def _evaluate(run: PreparedRun, comparison: "Comparison") -> None:
    from accel_gpt2.classify.evaluate import evaluate_run
    from accel_gpt2.classify.out_of_distribution import judge_trained, read_other_texts
    from accel_gpt2.classify.untrained import evaluate_classical
    from accel_gpt2.classify.zero_shot import evaluate_zero_shot

    quiet = run.options.quiet
    others = None
    if run.other_dataset is not None:
        others = read_other_texts(run.other_dataset, progress=not quiet)
    for arm in run.planned.arms:
        if run.is_evaluated(arm):
            continue
        if arm.trained:
            evaluate_run(run.directory, pll=arm.pll, baseline=False, quiet=quiet)
            if others is not None and run.other_dataset_for(arm):
                judge_trained(run.directory, arm, others, quiet=quiet)
        elif arm.kind == "zero_shot":
            evaluate_zero_shot(
                run.directory,
                arm,
                run.recipe,
                others,
                class_names=comparison.data["class_names"],
                quiet=quiet,
            )
        else:
            evaluate_classical(run.directory, arm, run.recipe, others, quiet=quiet)
    _free_gpu_memory()


def _free_gpu_memory() -> None:
    """Leave the card to the next trainer, which is another process."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
