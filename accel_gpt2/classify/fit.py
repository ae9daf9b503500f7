"""One language model per class: the launched process's whole job, from text to `final/` folders."""

import dataclasses
import gc
import json
import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from accel_gpt2.classify.card import write_card
from accel_gpt2.classify.describe import announce_plan, describe_environment, describe_plan
from accel_gpt2.classify.prepare import PreparedData, prepare_data
from accel_gpt2.classify.run import (
    CALIBRATION,
    TRAINING_RECORD,
    class_directory,
)
from accel_gpt2.classify.validation import calibrate, joint_accuracy, log_joint_validation
from accel_gpt2.data.tokenizer import TextTokenizer
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import ResolvedRecipe, TrainRecipe, result_differences, to_yaml
from accel_gpt2.train.checkpoint import (
    Identity,
    TrainState,
    checkpoint_path,
    is_whole,
    newest_checkpoint,
    publish_directory,
    read_state,
    read_weights,
    set_aside_newer,
    verify,
    write_json,
)
from accel_gpt2.train.loop import (
    BatchSchedule,
    ClassTraining,
    append_json_line,
    train_class,
)
from accel_gpt2.train.model import build_model
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
from accel_gpt2.train.stopping import StopRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Standing:
    """Where a class stands when a run starts, decided by the first process for all."""

    finished: bool
    checkpoint: Path | None  # whole; what to go on from
    skipped: tuple[str, ...]  # what is wrong with newer ones


def fit(
    resolved: ResolvedRecipe, run_directory: Path, *, resume: str = "auto", quiet: bool = False
) -> None:
    """Train every class of the recipe's data set, one after another, into `run_directory`.

    What is finished is not done again; a class that was interrupted goes on from its newest whole
    checkpoint. Under a launcher all processes call this together.

    Args:
        resume: "auto" goes on with what is there; "never" moves it aside and starts anew; a path
            to a checkpoint makes its class go on from that one.

    Raises:
        UserError: when something that the user can change stands in the way.
        StoppedEarly: by a signal or the time limit, with the work saved.
    """
    recipe = resolved.recipe
    talks = is_first_process()
    with StopRequest(recipe.max_time_seconds) as stop:
        check_precision(recipe)
        check_trackers(recipe)
        data = prepare_data(recipe, progress=talks and not quiet)
        accelerator = build_accelerator(recipe, run_directory)
        standings = on_first_process(
            accelerator, lambda: _start_directory(run_directory, recipe, data, resume=resume)
        )
        start_trackers(accelerator)
        try:
            with TrainProgress(shown=talks, quiet=quiet) as progress:
                _fit_classes(
                    recipe,
                    run_directory,
                    data,
                    standings,
                    accelerator,
                    stop=stop,
                    progress=progress,
                )
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()


def _start_directory(
    run_directory: Path, recipe: TrainRecipe, data: PreparedData, *, resume: str
) -> list[_Standing]:
    """Look at what is there, refuse what does not go together, and only then write."""
    run_directory.mkdir(parents=True, exist_ok=True)
    if resume == "never":
        _move_aside(run_directory)
    names = data.text.class_names
    directories = _class_directories(run_directory, data)
    chosen = None if resume in {"auto", "never"} else _chosen_checkpoint(resume, len(names))
    standings = []
    for index, directory in enumerate(directories):
        identity = _identity(recipe, data, index)
        standing = _standing(directory, identity, recipe)
        if chosen is not None and chosen[0] == index:
            if standing.finished:
                raise UsageError(
                    f"--resume {resume}: {names[index]} is trained to the end already; give "
                    f"--resume auto to go on with the others, or remove {directory / 'final'}."
                )
            _check_identity(read_state(chosen[1])[1], identity, recipe, chosen[1])
            standing = _Standing(finished=False, checkpoint=chosen[1], skipped=())
        standings.append(standing)
    for directory, standing in zip(directories, standings, strict=True):
        directory.mkdir(exist_ok=True)
        if not standing.finished:
            start = standing.checkpoint
            set_aside_newer(directory, -1 if start is None else read_state(start)[0].step)
    (run_directory / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    if not (run_directory / "command.txt").is_file():
        (run_directory / "command.txt").write_text(shlex.join(sys.argv) + "\n", encoding="utf-8")
    write_json(run_directory / "environment.json", describe_environment())
    data.tokenizer.save(run_directory / "tokenizer")
    return standings


def _class_directories(run_directory: Path, data: PreparedData) -> list[Path]:
    names = data.text.class_names
    return [class_directory(run_directory, index, name) for index, name in enumerate(names)]


def _move_aside(run_directory: Path) -> None:
    """Results of an earlier run are kept, under a name that says when they were put there."""
    old = [*run_directory.glob("class-*"), *run_directory.glob("evaluation*")]
    old += [run_directory / name for name in ("log.jsonl", CALIBRATION, "trackers")]
    old = [path for path in old if path.exists()]
    if old:
        aside = run_directory / time.strftime("before-%Y-%m-%d-%H%M%S")
        aside.mkdir()
        for path in old:
            path.replace(aside / path.name)


def _fit_classes(
    recipe: TrainRecipe,
    run_directory: Path,
    data: PreparedData,
    standings: list[_Standing],
    accelerator: Any,
    *,
    stop: StopRequest,
    progress: TrainProgress,
) -> None:
    names = data.text.class_names
    directories = _class_directories(run_directory, data)
    by_class = [data.train.for_class(index) for index in range(len(names))]
    steps = [BatchSchedule(data.train.lengths[indices], recipe).total_steps for indices in by_class]
    stop.saving = any(x.finished or x.checkpoint is not None for x in standings)
    gpu = current_gpu(accelerator)

    def log(row: dict[str, object]) -> None:
        if not accelerator.is_main_process:
            return
        append_json_line(run_directory / "log.jsonl", row)
        slug = directories[int(str(row["class_index"]))].name
        numbers = {
            f"{slug}/{key}": value
            for key, value in row.items()
            if isinstance(value, int | float) and key not in {"class_index", "step", "best"}
        }
        accelerator.log(numbers, step=row["step"])

    described = False
    for index, (name, directory, standing) in enumerate(
        zip(names, directories, standings, strict=True)
    ):
        if standing.finished:
            progress.say(f"{name} ({index + 1}/{len(names)}) is trained already")
            continue
        for problem in standing.skipped:
            progress.say(f"Skipped: {problem}")
        if standing.checkpoint is not None:
            progress.say(f"{name} goes on from {standing.checkpoint}")
        model = build_model(
            recipe,
            vocab_size=data.tokenizer.vocab_size,
            eos_token_id=data.tokenizer.eos_token_id,
        )
        if not described:
            described = True
            plan = describe_plan(recipe, data, model, by_class, steps, accelerator.num_processes)
            on_first_process(accelerator, partial(_write_plan, run_directory, recipe, plan))
            announce_plan(progress, plan, run_directory, accelerator)
        job = ClassTraining(
            identity=_identity(recipe, data, index),
            directory=directory,
            documents=data.train.select(by_class[index]),
            validation=data.validation,
            model=model,
            checkpoint=standing.checkpoint,
            joint_accuracy=joint_accuracy(index, directories, data, recipe),
            num_classes=len(names),
            earlier_seconds=sum(_training_seconds(directory) for directory in directories),
            later_steps=sum(
                count
                for later, count in enumerate(steps)
                if later > index and not standings[later].finished
            ),
        )
        start = standing.checkpoint
        event = "start" if start is None else "resume"
        step = 0 if start is None else read_state(start)[0].step
        log({"event": event, "class_index": index, "class_name": name, "step": step})
        state = train_class(
            job, recipe, accelerator=accelerator, gpu=gpu, stop=stop, progress=progress, log=log
        )
        on_first_process(accelerator, partial(_publish_final, job, data.tokenizer, state))
        log({"event": "finish", "class_index": index, "class_name": name, "step": state.step})
        # In this order, or the next model is built while this one is still on the device:
        # Accelerate's wrapped forward pass makes the model a cycle that only gc takes apart.
        del model, job
        accelerator.free_memory()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    on_first_process(accelerator, lambda: calibrate(run_directory, data, progress))
    if described and accelerator.is_main_process:  # something was trained
        log_joint_validation(run_directory, directories, data, recipe)


def _write_plan(run_directory: Path, recipe: TrainRecipe, plan: dict[str, Any]) -> None:
    write_json(run_directory / "plan.json", plan)
    write_card(run_directory, recipe, plan, metrics=None)


def _identity(recipe: TrainRecipe, data: PreparedData, index: int) -> Identity:
    recipe_values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(recipe).items()
    }
    return Identity(
        class_index=index,
        class_name=data.text.class_names[index],
        data_fingerprint=data.text.fingerprint,
        tokenizer_fingerprint=data.tokenizer.fingerprint,
        recipe=recipe_values,
    )


def _check_identity(there: Identity, here: Identity, recipe: TrainRecipe, path: Path) -> None:
    """Raise UserError unless work under the one identity may go on under the other."""
    problems = []
    if (there.class_index, there.class_name) != (here.class_index, here.class_name):
        problems.append(f"it is of class {there.class_name!r}, not {here.class_name!r}")
    if there.data_fingerprint != here.data_fingerprint:
        problems.append("the training text has changed since")
    if there.tokenizer_fingerprint != here.tokenizer_fingerprint:
        problems.append("the tokenizer has changed since")
    old_values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in there.recipe.items()
        if key in dataclasses.asdict(recipe)
    }
    old = dataclasses.replace(recipe, **old_values)
    problems += [
        f"{key} was {before!r} and is {now!r}"
        for key, (before, now) in result_differences(old, recipe).items()
    ]
    if problems:
        raise UserError(
            f"{path} does not go on from here: {'; '.join(problems)}. Give the earlier values, "
            "--resume never to start anew, or another --output-dir."
        )


def _standing(directory: Path, identity: Identity, recipe: TrainRecipe) -> _Standing:
    final = directory / "final"
    if is_whole(final):
        record = json.loads((final / TRAINING_RECORD).read_text(encoding="utf-8"))
        _check_identity(Identity(**record["identity"]), identity, recipe, final)
        return _Standing(finished=True, checkpoint=None, skipped=())
    # A damaged `final/` is exported again, from the checkpoints.
    checkpoint, problems = newest_checkpoint(directory)
    if checkpoint is not None:
        _check_identity(read_state(checkpoint)[1], identity, recipe, checkpoint)
    return _Standing(finished=False, checkpoint=checkpoint, skipped=tuple(problems))


def _chosen_checkpoint(resume: str, num_classes: int) -> tuple[int, Path]:
    path = Path(resume).resolve()  # `best` is a link that moves on
    if not path.is_dir():
        raise UsageError(f"--resume {resume}: give auto, never, or a checkpoint directory.")
    verify(path)
    if not (path / "state.json").is_file():
        raise UsageError(
            f"--resume {resume}: it is no checkpoint; give a checkpoint-... directory."
        )
    class_index = read_state(path)[1].class_index
    if class_index >= num_classes:
        raise UsageError(f"--resume {resume}: it is of a class that this data set has not got.")
    return class_index, path


def _training_seconds(directory: Path) -> float:
    record = directory / "final" / TRAINING_RECORD
    if not record.is_file():
        return 0.0
    return float(json.loads(record.read_text(encoding="utf-8"))["seconds"])


def _publish_final(job: ClassTraining, tokenizer: TextTokenizer, state: TrainState) -> None:
    """Write `final/` from the best checkpoint: a model that transformers or peft loads as it is."""
    best = checkpoint_path(job.directory, state.best_step)
    verify(best)
    job.model.load_trainable_state(read_weights(best))

    def write(staging: Path) -> None:
        job.model.save_pretrained(staging)
        tokenizer.save(staging)
        record = {
            "class_index": job.identity.class_index,
            "class_name": job.identity.class_name,
            "best_step": state.best_step,
            "best_bits_per_token": state.best_bits_per_token,
            "steps": state.step,
            "document_tokens": state.tokens,
            "seconds": state.seconds,
            "peak_memory_bytes": state.peak_memory_bytes,
            "identity": dataclasses.asdict(job.identity),
        }
        write_json(staging / TRAINING_RECORD, record)

    publish_directory(job.directory / "final", write)
