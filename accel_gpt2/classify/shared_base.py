"""All parts of a run at once: their adapters, on one base that is in memory once."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from accel_gpt2.classify.part_training import RunTraining
from accel_gpt2.classify.run import LOG
from accel_gpt2.errors import UserError
from accel_gpt2.plan.support import check_supported
from accel_gpt2.train.backend import MicroBatch
from accel_gpt2.train.checkpoint import TrainState
from accel_gpt2.train.loop import ClassTraining, train_steps
from accel_gpt2.train.processes import build_accelerator, current_gpu, current_strategy
from accel_gpt2.train.run_log import append_json_line
from accel_gpt2.train.shared_base import (
    StackedModels,
    Training,
    Turn,
    share_frozen,
    train_side_by_side,
    trial_micro_batches,
    try_stacking,
    why_not_stacked,
)


def train_on_shared_base(training: RunTraining) -> None:
    """Train every part that is not finished, each as `RunTraining.train` would.

    Each has its optimizer, schedule, random numbers, checkpoints and validation; what is on the
    disk is the same, and each part goes on by itself, under either placement.

    Raises:
        UsageError: for a recipe or a launch that has no base to share.
        StoppedEarly: after all parts have saved.
        UserError: when a part failed; the others were trained to their ends.
    """
    strategy = current_strategy(training.accelerator)
    check_supported(training.recipe, strategy, "shared-base")
    parts = [part for part in training.parts if training.announce(part)]
    if not parts:
        return
    device: torch.device = training.accelerator.device
    gpu = current_gpu(training.accelerator)
    first = training.build_model()
    models = [first, *(share_frozen(first) for _ in parts[1:])]
    jobs: list[ClassTraining] = []

    def begin() -> Iterator[Training]:
        for part, model in zip(parts, models, strict=True):
            job = training.begin(part, model)
            jobs.append(dataclasses.replace(job, later_steps=partial(_steps_of_others, job, jobs)))
            turn = Turn(device)
            steps = train_steps(
                jobs[-1],
                training.recipe,
                # One for each: it holds a model's loss scale.
                accelerator=build_accelerator(training.recipe),
                gpu=gpu,
                stop=training.stop,
                progress=training.progress,
                log=training.log,
                clock=turn.clock,
            )
            yield Training(steps=steps, turn=turn)

    def on_finished(number: int, state: TrainState) -> None:
        training.finish(parts[number], jobs[number], state)

    def on_failed(number: int, error: UserError) -> None:
        training.failed(parts[number], error)

    training.stop.trainings = len(parts)
    train_side_by_side(
        begin(),
        stack=lambda pending: _choose(training, jobs, pending),
        on_finished=on_finished,
        on_failed=on_failed,
    )


def _steps_of_others(job: ClassTraining, jobs: Sequence[ClassTraining], step: int) -> int:
    """How many steps others still have when each of them has as many behind it as this one."""
    others = (other for other in jobs if other.identity != job.identity)
    return sum(max(0, other.schedule.total_steps - step) for other in others)


def _choose(
    training: RunTraining, jobs: Sequence[ClassTraining], pending: Sequence[MicroBatch]
) -> StackedModels | None:
    """The faster way on a few micro batches of these classes; it is said and logged."""
    recipe = training.recipe
    device: torch.device = training.accelerator.device
    of_model = {id(job.model): job for job in jobs}
    own = [of_model[id(item.backend.plain_model)] for item in pending]
    models = [job.model for job in own]
    stacked, trial = None, None
    reason = why_not_stacked(models, recipe)
    if reason is None:
        stacked = StackedModels(
            models, training.accelerator, micro_batch_tokens=recipe.micro_batch_tokens
        )
        trials = zip(
            *(
                trial_micro_batches(job, recipe, item, device)
                for job, item in zip(own, pending, strict=True)
            ),
            strict=True,
        )
        trial = try_stacking(stacked, [*trials], device)
        reason = f"stacked {trial.gain:.2f}x as fast" if trial else "micro batches are full alone"
        if trial is None or not trial.is_faster:
            stacked = None
    way = "one after another" if stacked is None else "stacked in one batch"
    training.progress.say(f"{len(models)} adapters on one base, {way}: {reason}")
    row: dict[str, object] = {
        "event": "shared_base",
        "num_adapters": len(models),
        "stacked": stacked is not None,
        "reason": reason,
        **({} if trial is None else dataclasses.asdict(trial)),
    }
    append_json_line(own[0].directory.parent / LOG, row)
    return stacked
