"""The launched process's whole job, from text to `final/` folders: every part of a run."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from accel_gpt2.classify.lock import hold
from accel_gpt2.classify.part_training import DirectoryRecords, RunTraining, count_steps
from accel_gpt2.classify.parts import parts_of
from accel_gpt2.classify.placed import PlacedTraining, is_placed
from accel_gpt2.classify.placed_progress import PlacedProgress
from accel_gpt2.classify.prepare import PreparedData, prepare_data
from accel_gpt2.classify.run import (
    CALIBRATION,
    holds_work,
)
from accel_gpt2.classify.shared_base import train_on_shared_base
from accel_gpt2.classify.spending import read_spent_seconds, write_spent_seconds
from accel_gpt2.classify.standing import (
    Standing,
    start_directory,
)
from accel_gpt2.classify.status import read_classes, where_they_are
from accel_gpt2.classify.validation import calibrate, log_joint_validation
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import ResolvedRecipe, TrainRecipe
from accel_gpt2.train.peers import watching_peers
from accel_gpt2.train.processes import (
    build_accelerator,
    check_precision,
    check_trackers,
    is_first_process,
    on_first_process,
    start_trackers,
)
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.stopping import StopRequest, limits_of

T = TypeVar("T")


def fit(
    resolved: ResolvedRecipe,
    run_directory: Path,
    *,
    resume: str = "auto",
    quiet: bool = False,
    silent: bool = False,
    handle_signals: bool = True,
) -> None:
    """Train what the recipe asks for, a model per class or one of all, into `run_directory`.

    What is finished is not done again; a model that was interrupted goes on from its newest whole
    checkpoint. Under a launcher all processes call this together.

    Args:
        resume: "auto" goes on with what is there; "never" moves it aside and starts anew; a path
            to a checkpoint makes its class go on from that one.
        quiet: plain lines in place of live ones.
        silent: nothing is printed.
        handle_signals: finish the step and save on a signal; False leaves signals to the program
            that calls this, so that Ctrl-C is its KeyboardInterrupt.

    Raises:
        UserError: when something that the user can change stands in the way, such as another
            process at work in the directory, or when another process of this run fails.
        StoppedEarly: by a signal, the time limit or the budget, with the work saved.
    """
    recipe = resolved.recipe
    leads = is_first_process()
    talks = leads and not silent
    goes_on = resume != "never"
    spent_seconds = read_spent_seconds(run_directory if goes_on else None, recipe)
    limits = limits_of(recipe, spent_seconds)
    with (
        watching_peers(),
        hold(run_directory) if leads else contextlib.nullcontext(),
        StopRequest(
            limits,
            saved=goes_on and holds_work(run_directory),
            handle_signals=handle_signals,
        ) as stop,
    ):
        check_precision(recipe)
        check_trackers(recipe)
        placed = is_placed(recipe)  # its children train, and this process watches them
        data = prepare_data(recipe, progress=talks and not quiet)
        stop.preparing = False  # from here on the processes leave together
        accelerator = None if placed else build_accelerator(recipe, run_directory)
        standings = _on_first_process(
            accelerator, lambda: start_directory(run_directory, recipe, data, resume=resume)
        )
        if accelerator is not None:
            start_trackers(accelerator)
        display = PlacedProgress if placed else TrainProgress
        try:
            with display(shown=talks, quiet=quiet) as progress:
                stop.announce = progress.note
                _fit_parts(
                    recipe,
                    run_directory,
                    data,
                    standings,
                    accelerator,
                    stop=stop,
                    progress=progress,
                    spent_seconds=spent_seconds,
                )
        except BaseException:
            # The person is told what ended the run, not what else a full disk has no room for.
            with contextlib.suppress(UserError, OSError):
                _close(accelerator, run_directory, recipe, spent_seconds + stop.seconds)
            classes = read_classes(run_directory)
            if talks and len(classes) > 1:
                progress.say(where_they_are(classes, at_work=True))
            raise
        _close(accelerator, run_directory, recipe, spent_seconds + stop.seconds)


def _close(
    accelerator: Any | None, run_directory: Path, recipe: TrainRecipe, spent_seconds: float
) -> None:
    with contextlib.ExitStack() as closing:  # each of them, also when one fails
        if is_first_process():
            closing.callback(write_spent_seconds, run_directory, spent_seconds, recipe)
        for tracker in accelerator.trackers if accelerator is not None else ():
            closing.callback(tracker.finish)


def _on_first_process(accelerator: Any | None, work: Callable[[], T]) -> T:
    return work() if accelerator is None else on_first_process(accelerator, work)


def _fit_parts(
    recipe: TrainRecipe,
    run_directory: Path,
    data: PreparedData,
    standings: list[Standing],
    accelerator: Any | None,
    *,
    stop: StopRequest,
    progress: TrainProgress,
    spent_seconds: float,
) -> None:
    """Train all parts, on `accelerator` or in children, and fit what needs all of them."""
    parts = parts_of(run_directory, recipe.objective, data.text.class_names)
    steps = count_steps(recipe, data, parts, standings)
    for warning in (text for standing in standings for text in standing.warnings):
        progress.say(f"Warning: {warning}")
    records = DirectoryRecords(
        run_directory,
        parts,
        standings,
        steps,
        recipe=recipe,
        spent=lambda: write_spent_seconds(run_directory, spent_seconds + stop.seconds, recipe),
    )
    training: RunTraining | PlacedTraining
    with records if is_first_process() else contextlib.nullcontext():
        if accelerator is None:
            assert isinstance(progress, PlacedProgress)
            training = PlacedTraining(
                recipe,
                run_directory,
                data,
                parts,
                standings,
                steps=steps,
                stop=stop,
                progress=progress,
                records=records,
                spent_seconds=spent_seconds,
            )
            training.run()
        else:
            training = RunTraining(
                recipe,
                run_directory,
                data,
                standings,
                accelerator,
                stop=stop,
                progress=progress,
                spent_seconds=spent_seconds,
                records=records,
                steps=steps,
            )
            if recipe.placement == "shared-base":
                train_on_shared_base(training)
            else:
                for part in parts:
                    if training.announce(part):
                        training.train(part)
    if recipe.objective == "unconditional":
        return  # it tells no classes apart
    # Unless nothing was trained now, and an earlier start came to its end.
    if is_first_process() and (training.plan or not (run_directory / CALIBRATION).is_file()):
        log_joint_validation(run_directory, parts, data, training.recipe)
    _on_first_process(accelerator, lambda: calibrate(run_directory, data, progress))
