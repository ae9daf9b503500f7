"""The launched process's whole job, from text to `final/` folders: every part of a run."""

import contextlib
import dataclasses
import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from accel_gpt2.classify.card import write_card
from accel_gpt2.classify.describe import announce_plan, describe_plan
from accel_gpt2.classify.lock import hold
from accel_gpt2.classify.parts import Part, parts_of
from accel_gpt2.classify.prepare import PreparedData, prepare_data
from accel_gpt2.classify.run import (
    CALIBRATION,
    LOG,
    TRAINING_RECORD,
    holds_work,
    read_spent_seconds,
    read_training_record,
    score_log_prior,
    write_recipe,
    write_spent_seconds,
)
from accel_gpt2.classify.standing import (
    Standing,
    part_identity,
    start_directory,
)
from accel_gpt2.classify.validation import calibrate, joint_accuracy, log_joint_validation
from accel_gpt2.data.tokenizer import TextTokenizer
from accel_gpt2.durable import write_json
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import ResolvedRecipe, TrainRecipe
from accel_gpt2.train.checkpoint import TrainState, checkpoint_path, read_state, read_weights
from accel_gpt2.train.loop import ClassTraining, train_class
from accel_gpt2.train.manifest import publish_directory, verify
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import TransformersModel
from accel_gpt2.train.peers import watching_peers
from accel_gpt2.train.processes import (
    build_accelerator,
    check_precision,
    check_trackers,
    current_gpu,
    is_first_process,
    on_first_process,
    start_trackers,
)
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.run_log import append_json_line, cut_unfinished_line
from accel_gpt2.train.schedule import BatchSchedule
from accel_gpt2.train.stopping import StopRequest, limits_of


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
    spent_seconds = read_spent_seconds(run_directory) if goes_on else 0.0
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
        data = prepare_data(recipe, progress=talks and not quiet)
        stop.preparing = False  # from here on the processes leave together
        accelerator = build_accelerator(recipe, run_directory)
        standings = on_first_process(
            accelerator, lambda: start_directory(run_directory, recipe, data, resume=resume)
        )
        start_trackers(accelerator)
        try:
            with TrainProgress(shown=talks, quiet=quiet) as progress:
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
                _close(accelerator, run_directory, spent_seconds + stop.seconds)
            raise
        _close(accelerator, run_directory, spent_seconds + stop.seconds)


def _close(accelerator: Any, run_directory: Path, spent_seconds: float) -> None:
    with contextlib.ExitStack() as closing:  # each of them, also when one fails
        if accelerator.is_main_process:
            closing.callback(write_spent_seconds, run_directory, spent_seconds)
        for tracker in accelerator.trackers:
            closing.callback(tracker.finish)


def _fit_parts(
    recipe: TrainRecipe,
    run_directory: Path,
    data: PreparedData,
    standings: list[Standing],
    accelerator: Any,
    *,
    stop: StopRequest,
    progress: TrainProgress,
    spent_seconds: float,
) -> None:
    parts = parts_of(run_directory, recipe.objective, data.text.class_names)
    documents = [part.own(data.train) for part in parts]
    schedules = [
        BatchSchedule(data.train.lengths[own], recipe, total_steps=_known_steps(part, standing))
        for own, part, standing in zip(documents, parts, standings, strict=True)
    ]
    steps = [schedule.total_steps for schedule in schedules]
    gpu = current_gpu(accelerator)
    plan: dict[str, Any] = {}

    def log(row: dict[str, object]) -> None:
        if not accelerator.is_main_process:
            return
        append_json_line(run_directory / LOG, row)
        slug = parts[int(str(row["class_index"]))].directory.name
        numbers = {
            f"{slug}/{key}": value
            for key, value in row.items()
            if isinstance(value, int | float) and key not in {"class_index", "step", "best"}
        }
        accelerator.log(numbers, step=row["step"])

    def on_recipe(smaller: TrainRecipe) -> None:
        nonlocal recipe
        recipe = smaller
        plan["micro_batch_tokens"] = smaller.micro_batch_tokens

        def write() -> None:
            write_recipe(run_directory, smaller)
            _write_plan(run_directory, smaller, plan)

        on_first_process(accelerator, write)

    if accelerator.is_main_process:
        cut_unfinished_line(run_directory / LOG)
    for warning in (text for standing in standings for text in standing.warnings):
        progress.say(f"Warning: {warning}")
    for part, own, schedule, standing in zip(parts, documents, schedules, standings, strict=True):
        if standing.finished:
            progress.say(f"{part.name} ({part.index + 1}/{len(parts)}) is trained already")
            continue
        for problem in standing.skipped:
            progress.say(f"Skipped: {problem}")
        if standing.checkpoint is not None:
            progress.say(f"{part.name} goes on from {standing.checkpoint}")
        model = build_model(
            recipe,
            vocab_size=data.tokenizer.vocab_size,
            eos_token_id=data.tokenizer.eos_token_id,
            mask_token_id=data.tokenizer.mask_token_id,
            pad_token_id=data.tokenizer.pad_token_id,
            class_names=data.text.class_names,
            log_prior=score_log_prior(recipe, data.class_counts),
            mean_tokens=float(data.train.lengths.mean()) - 1,
        )
        if not plan:
            plan = describe_plan(recipe, data, model, parts, steps, accelerator.num_processes)
            on_first_process(accelerator, partial(_write_plan, run_directory, recipe, plan))
            announce_plan(progress, plan, run_directory, accelerator)
        job = ClassTraining(
            identity=part_identity(recipe, data, part),
            directory=part.directory,
            documents=data.train.select(own),
            validation=data.validation,
            own_validation=part.own(data.validation),
            model=model,
            schedule=schedule,
            checkpoint=standing.checkpoint,
            joint_accuracy=joint_accuracy(part, parts, data, recipe),
            num_parts=len(parts),
            spent_seconds=spent_seconds,
            later_steps=sum(
                count
                for later, count in enumerate(steps)
                if later > part.index and not standings[later].finished
            ),
            on_recipe=on_recipe,
            on_saved=lambda: write_spent_seconds(run_directory, spent_seconds + stop.seconds),
        )
        start = standing.checkpoint
        event = "start" if start is None else "resume"
        step = 0 if start is None else read_state(start)[0].step
        log(
            {
                "event": event,
                "class_index": part.index,
                "class_name": part.name,
                "step": step,
                "world_size": accelerator.num_processes,
                "changed": {key: list(pair) for key, pair in standing.changed.items()},
            }
        )
        state = train_class(
            job, recipe, accelerator=accelerator, gpu=gpu, stop=stop, progress=progress, log=log
        )
        on_first_process(
            accelerator, partial(_publish_finals, job, part.finals, data.tokenizer, state)
        )
        log(
            {
                "event": "finish",
                "class_index": part.index,
                "class_name": part.name,
                "step": state.step,
            }
        )
        # In this order, or the next model is built while this one is still on the device:
        # Accelerate's wrapped forward pass makes the model a cycle that only gc takes apart.
        del model, job
        accelerator.free_memory()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if recipe.objective == "unconditional":
        return  # it tells no classes apart
    # Unless nothing was trained now, and an earlier start came to its end.
    if accelerator.is_main_process and (plan or not (run_directory / CALIBRATION).is_file()):
        log_joint_validation(run_directory, parts, data, recipe)
    on_first_process(accelerator, lambda: calibrate(run_directory, data, progress))


def _write_plan(run_directory: Path, recipe: TrainRecipe, plan: dict[str, Any]) -> None:
    write_json(run_directory / "plan.json", plan)
    write_card(run_directory, recipe, plan, metrics=None)


def _known_steps(part: Part, standing: Standing) -> int | None:
    """The number of a part's steps, where a checkpoint or its final model tells it."""
    if standing.finished:
        return read_training_record(part.finals[0]).steps
    if standing.checkpoint is None:
        return None
    return read_state(standing.checkpoint)[0].total_steps


def _publish_finals(
    job: ClassTraining, finals: Sequence[Path], tokenizer: TextTokenizer, state: TrainState
) -> None:
    """Write each `final/` from the best checkpoint: what transformers or peft loads as it is."""
    best = checkpoint_path(job.directory, state.best_step)
    verify(best)
    job.model.load_trainable_state(read_weights(best), best)
    record = {
        "class_index": job.identity.class_index,
        "class_name": job.identity.class_name,
        "best_step": state.best_step,
        "best_loss_bits": state.best_loss_bits,
        "steps": state.step,
        "document_tokens": state.tokens,
        "seconds": state.seconds,
        "peak_memory_bytes": state.peak_memory_bytes,
        "identity": dataclasses.asdict(job.identity),
    }

    def write(model: TransformersModel, staging: Path) -> None:
        model.save_pretrained(staging)
        tokenizer.save(staging)
        write_json(staging / TRAINING_RECORD, record)

    for final, model in zip(finals, job.model.finals, strict=True):
        publish_directory(final, partial(write, model))
