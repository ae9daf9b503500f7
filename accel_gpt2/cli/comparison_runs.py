"""The runs of a comparison, resolved and checked all at once, before anything is loaded."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accel_gpt2.catalog.arms import ArmSpec
from accel_gpt2.classify.aside import is_trained
from accel_gpt2.classify.evaluations import is_evaluated, read_out_of_distribution
from accel_gpt2.classify.lock import LOCK_FILE, OWNER_FILE
from accel_gpt2.cli.hardware import DetectedHardware, detect_hardware
from accel_gpt2.cli.options import TrainOptions
from accel_gpt2.cli.output import warn
from accel_gpt2.cli.run_directory import (
    check_run_directory,
    default_run_directory,
)
from accel_gpt2.cli.train import TrainChoice, choose
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.plan.candidates import is_planned
from accel_gpt2.plan.comparison import DECIDED_FIELDS, PlannedRun, default_encoder, plan_runs
from accel_gpt2.recipe import Init, Layer, TrainRecipe

if TYPE_CHECKING:
    pass

COMPARISON_FILE = "comparison.json"
_CALIBRATION_FILE = "calibration.json"  # the last thing that a training writes


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
    from accel_gpt2.cli.planning import kept_choices

    detect = functools.cache(detect)
    asked = choose(options, detect=detect)
    if is_planned(asked.resolved.origins["finetuning"]):  # each arm has its own
        whole = Layer(origin="compare", values={"finetuning": "full"})
        asked = choose(dataclasses.replace(options, layers=(*options.layers, whole)), detect=detect)
    for warning in (*asked.warnings, *_overruled(asked)):
        warn(warning)
    undecided = {key: getattr(TrainRecipe(), key) for key in DECIDED_FIELDS}
    recipe = dataclasses.replace(asked.resolved.recipe, **undecided)
    directory = options.output_dir or _default_directory(recipe)
    _check_directory(directory)
    encoder = encoder or default_encoder(recipe.init)
    planned = plan_runs(
        arms,
        recipe,
        encoder=encoder,
        directory=directory,
        num_seeds=num_seeds,
        train_documents=train_documents,
    )
    # By its name, so that what there is to say about this machine is said once and not every time.
    # What arm 3 needs to fit holds for all arms, or they would differ in more than their names say.
    alike = {key: getattr(recipe, key) for key in ("mixed_precision", "optimizer")}
    for run in planned:  # and what a comparison was begun with is what it goes on with
        for kept in kept_choices(directory / run.directory, asked.profile, resume="auto"):
            alike = {key: kept.values[key] for key in alike}
    machine = Layer(origin="--profile", values={"profile": asked.profile.name, **alike})
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
