"""The runs of a comparison: checked all at once, then trained and evaluated one after another."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from accel_gpt2.catalog.arms import ArmSpec
from accel_gpt2.classify.aside import is_trained
from accel_gpt2.classify.evaluations import is_evaluated, read_out_of_distribution
from accel_gpt2.classify.lock import LOCK_FILE, OWNER_FILE, hold
from accel_gpt2.cli.errors import report
from accel_gpt2.cli.hardware import DetectedHardware, detect_hardware
from accel_gpt2.cli.launcher import Launcher, run_launch
from accel_gpt2.cli.options import TrainOptions
from accel_gpt2.cli.output import say, warn
from accel_gpt2.cli.run_directory import (
    STATUS_FILE,
    check_run_directory,
    default_run_directory,
)
from accel_gpt2.cli.train import TrainChoice, choose, launch_training
from accel_gpt2.errors import ExitCode, StoppedEarly, UsageError, UserError
from accel_gpt2.failures import mark_as_told
from accel_gpt2.plan.comparison import DECIDED_FIELDS, PlannedRun, default_encoder, plan_runs
from accel_gpt2.recipe import Init, Layer, TrainRecipe

if TYPE_CHECKING:
    from accel_gpt2.classify.comparison import Comparison

COMPARISON_FILE = "comparison.json"
_CALIBRATION_FILE = "calibration.json"  # the last thing that a training writes

# Drawing the pictures takes seconds, some of them in dark too.
_REPORT_EVERY_SECONDS = 60.0

# A trainer that ends so was told to: the comparison ends too, and goes on when it is started again.
_STOPS = (ExitCode.STOPPED, ExitCode.LIMIT_REACHED, ExitCode.INTERRUPTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRun:
    """A run whose recipe is resolved.

    `cannot` says why it cannot run here; empty when it can. `other_dataset` is the one whose
    documents it scores besides the test split's, if any.
    """

    planned: PlannedRun
    options: TrainOptions
    recipe: TrainRecipe
    directory: Path
    other_dataset: str | None = None
    cannot: str = ""

    @property
    def is_trained(self) -> bool:
        """Whether there is nothing left to train; always so for what the loop does not train."""
        if not self.planned.is_trained:
            return True
        calibrated = not self.planned.arms or (self.directory / _CALIBRATION_FILE).is_file()
        return calibrated and is_trained(self.directory)

    def other_dataset_for(self, arm: ArmSpec) -> str | None:
        """What an entry should notice to be no text of its own; estimates are not asked."""
        return self.other_dataset if arm.pll == "full" else None

    def is_evaluated(self, arm: ArmSpec) -> bool:
        """Whether all numbers of an entry are there."""
        if not self.is_trained or not is_evaluated(self.directory, arm, self.recipe):
            return False
        other = self.other_dataset_for(arm)
        return other is None or read_out_of_distribution(self.directory, arm, other) is not None

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.is_trained and all(self.is_evaluated(arm) for arm in self.planned.arms)

    @property
    def outlook(self) -> str:
        """What will happen to it, in words."""
        if self.is_done:
            return "done already"
        if self.cannot:
            return f"cannot run here: {self.cannot}"
        verbs = [] if self.is_trained else ["train"]
        return " and ".join([*verbs, "evaluate"] if self.planned.arms else verbs)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedComparison:
    """Everything that is decided before anything is loaded; `recipe` is the one of arm 3."""

    directory: Path
    recipe: TrainRecipe
    encoder: str
    other_dataset: str | None
    runs: tuple[PreparedRun, ...]


def prepare_comparison(
    options: TrainOptions,
    arms: Sequence[ArmSpec],
    *,
    encoder: str | None,
    num_seeds: int,
    train_documents: Sequence[int],
    other_dataset: str | None = None,
    check_weights: bool = True,
    detect: Callable[[], DetectedHardware] = detect_hardware,
) -> PreparedComparison:
    """Resolve the recipe of every run, and find out which of them cannot run here.

    Args:
        options: as of `train`: what holds for every run.
        check_weights: whether to look for weights and data; False keeps it to arithmetic.

    Raises:
        UserError: for a wrong recipe, data that is not to be had, a directory of other things, and
            runs that are there with another recipe.
    """
    detect = functools.cache(detect)
    asked = choose(options, detect=detect)
    for warning in (*asked.warnings, *_overruled(asked)):
        warn(warning)
    undecided = {key: getattr(TrainRecipe(), key) for key in DECIDED_FIELDS}
    recipe = dataclasses.replace(asked.resolved.recipe, **undecided)
    directory = options.output_dir or _default_directory(recipe)
    _check_directory(directory)
    encoder = encoder or default_encoder(recipe.model)
    planned = plan_runs(
        arms,
        recipe,
        encoder=encoder,
        directory=directory,
        num_seeds=num_seeds,
        train_documents=train_documents,
    )
    # By its name, so that what there is to say about this machine is said once and not every time.
    machine = Layer(origin="--profile", values={"profile": asked.profile.name})
    shared = dataclasses.replace(options, layers=(*options.layers, machine))
    prepare = functools.partial(
        _prepare_run, shared, directory=directory, other_dataset=other_dataset, detect=detect
    )
    runs = [prepare(run) for run in planned]
    if check_weights:
        from accel_gpt2.data.sources import check_data_available

        check_data_available(recipe)
        if other_dataset is not None:
            check_data_available(dataclasses.replace(TrainRecipe(), dataset=other_dataset))
        why = functools.cache(_why_unavailable)
        runs = [
            run
            if run.cannot or not _loads_weights(run.planned)
            else dataclasses.replace(run, cannot=why(recipe, run.recipe.model, run.recipe.init))
            for run in runs
        ]
    return PreparedComparison(
        directory=directory,
        recipe=recipe,
        encoder=encoder,
        other_dataset=other_dataset,
        runs=tuple(runs),
    )


def _overruled(choice: TrainChoice) -> list[str]:
    recipe, origins = choice.resolved.recipe, choice.resolved.origins
    return [
        f"{key} = {getattr(recipe, key)} (from {origins[key]}) has no effect: each arm has its "
        "own; --arms and --seeds choose among them."
        for key in DECIDED_FIELDS
        if getattr(recipe, key) != getattr(TrainRecipe(), key)
    ]


def _default_directory(recipe: TrainRecipe) -> Path:
    single = default_run_directory(recipe)
    return single.with_name(f"compare-{single.name}")


def _check_directory(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file; give another --output-dir.")
    if directory.is_dir() and not (directory / COMPARISON_FILE).is_file():
        others = [x.name for x in directory.iterdir() if x.name not in (LOCK_FILE, OWNER_FILE)]
        if others:
            raise UsageError(
                f"{directory} holds files and no {COMPARISON_FILE}: it is not a comparison's "
                "directory. Give another --output-dir."
            )


def _prepare_run(
    options: TrainOptions,
    run: PlannedRun,
    *,
    directory: Path,
    other_dataset: str | None,
    detect: Callable[[], DetectedHardware],
) -> PreparedRun:
    run_directory = directory / run.directory
    run_options = dataclasses.replace(
        options, layers=(*options.layers, run.layer), output_dir=run_directory
    )
    recipe = choose(run_options, detect=detect).resolved.recipe
    if run.is_trained:
        check_run_directory(run_directory, recipe, resume="auto")
    cannot = ""
    if run.arms and run.arms[0].kind == "zero_shot" and recipe.init == "scratch":
        cannot = (
            f"{recipe.model} has random weights here, and what was never trained knows no class by "
            "its name; give a --model that has pretrained weights."
        )
    return PreparedRun(
        planned=run,
        options=run_options,
        recipe=recipe,
        directory=run_directory,
        other_dataset=other_dataset if run.is_main else None,
        cannot=cannot,
    )


def _loads_weights(run: PlannedRun) -> bool:
    """Whether a run starts from a model that has to be there before the comparison begins."""
    return run.base is None and (run.is_trained or run.arms[0].backbone is not None)


def _why_unavailable(recipe: TrainRecipe, model: str, init: Init) -> str:
    from accel_gpt2.train.preflight import check_available

    try:
        check_available(dataclasses.replace(recipe, model=model, init=init))
    except UserError as error:
        return str(error)
    return ""


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
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        status = json.loads((run_directory / STATUS_FILE).read_text(encoding="utf-8"))
        return str(status["message"])
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
                judge_trained(run.directory, arm, others)
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
