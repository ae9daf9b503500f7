"""One language model per class: the launched process's whole job, from text to `final/` folders."""

import dataclasses
import gc
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from accel_gpt2.classify.bayes import log_priors, predict
from accel_gpt2.classify.calibration import fit_calibration
from accel_gpt2.classify.card import write_card
from accel_gpt2.classify.run import (
    CALIBRATION,
    PREPARE_LOCK,
    TRAINING_RECORD,
    class_directory,
    open_run,
)
from accel_gpt2.data.cache import cache_directory
from accel_gpt2.data.sources import TextData, load_text_data
from accel_gpt2.data.tokenized import TokenizedDocuments, tokenize_documents
from accel_gpt2.data.tokenizer import TextTokenizer, load_tokenizer
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
    VALIDATION_SCORES,
    BatchSchedule,
    ClassTraining,
    append_json_line,
    train_class,
    validation_scores_path,
)
from accel_gpt2.train.model import LanguageModel, build_model
from accel_gpt2.train.processes import (
    build_accelerator,
    check_precision,
    check_trackers,
    current_gpu,
    is_first_process,
    on_first_process,
    one_process_at_a_time,
    start_trackers,
)
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.stopping import StopRequest
from accel_gpt2.units import format_bytes, format_count

_RECORDED_PACKAGES = (
    "accel-gpt2",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "peft",
    "bitsandbytes",
    "numpy",
    "scikit-learn",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """The run's text and its tokens."""

    text: TextData
    tokenizer: TextTokenizer
    train: TokenizedDocuments
    validation: TokenizedDocuments


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


def prepare_data(recipe: TrainRecipe, *, progress: bool) -> PreparedData:
    """Read, clean, split and tokenise the recipe's training data, or take it from the cache.

    It happens before the processes meet, so that no collective waits for it; the first process of
    a machine does the work and the others read its cache.
    """
    with one_process_at_a_time(cache_directory() / PREPARE_LOCK):
        text = load_text_data(recipe, progress=progress)
        tokenizer = load_tokenizer(recipe, text.train["text"], progress=progress)
        train, validation = (
            tokenize_documents(
                split, tokenizer, recipe.max_length, description=name, progress=progress
            )
            for name, split in (("train", text.train), ("validation", text.validation))
        )
    return PreparedData(text=text, tokenizer=tokenizer, train=train, validation=validation)


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
    write_json(run_directory / "environment.json", _environment())
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
            plan = _describe_plan(recipe, data, model, by_class, steps, accelerator.num_processes)
            on_first_process(accelerator, partial(_write_plan, run_directory, recipe, plan))
            _announce(progress, plan, run_directory, accelerator)
        job = ClassTraining(
            identity=_identity(recipe, data, index),
            directory=directory,
            documents=data.train.select(by_class[index]),
            validation=data.validation,
            model=model,
            checkpoint=standing.checkpoint,
            joint_accuracy=_joint_accuracy(index, directories, data, recipe),
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
    on_first_process(accelerator, lambda: _calibrate(run_directory, data, progress))
    if described and accelerator.is_main_process:  # something was trained
        _log_joint_validation(run_directory, directories, data, recipe)


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


def _joint_accuracy(
    index: int, directories: list[Path], data: PreparedData, recipe: TrainRecipe
) -> Callable[[int, NDArray[np.float64]], float | None]:
    """Accuracy on validation of this class's model beside the finished models of all others."""
    log_prior = log_priors(_class_counts(data), recipe.priors)

    def accuracy(step: int, scores: NDArray[np.float64]) -> float | None:
        columns = [
            scores if other == index else _best_validation_scores(directory)
            for other, directory in enumerate(directories)
        ]
        present = [column for column in columns if column is not None]
        if len(present) < len(columns):
            return None
        predictions = predict(np.stack(present, axis=1), log_prior)
        return float((predictions == data.validation.labels).mean())

    return accuracy


def _log_joint_validation(
    run_directory: Path, directories: list[Path], data: PreparedData, recipe: TrainRecipe
) -> None:
    """Add a row for each evaluation, first to last: all classes' models of that time together.

    While classes are trained one after another, only the last one's rows can have this.
    """
    log_prior = log_priors(_class_counts(data), recipe.priors)
    by_class = [
        sorted((directory / VALIDATION_SCORES).glob("*.npy"), key=lambda path: int(path.stem))
        for directory in directories
    ]
    for number, paths in enumerate(zip(*by_class, strict=False), start=1):
        scores = np.stack([np.load(path, allow_pickle=False) for path in paths], axis=1)
        accuracy = float((predict(scores, log_prior) == data.validation.labels).mean())
        row: dict[str, object] = {
            "event": "joint_validation",
            "evaluation": number,
            "steps": [int(path.stem) for path in paths],
            "accuracy": accuracy,
        }
        append_json_line(run_directory / "log.jsonl", row)


def _class_counts(data: PreparedData) -> list[int]:
    return [int(n) for n in np.bincount(data.train.labels, minlength=len(data.text.class_names))]


def _best_validation_scores(directory: Path) -> NDArray[np.float64] | None:
    """Of a finished class; None when it is not finished."""
    record = directory / "final" / TRAINING_RECORD
    if not record.is_file():
        return None
    best_step = json.loads(record.read_text(encoding="utf-8"))["best_step"]
    path = validation_scores_path(directory, best_step)
    try:
        scores: NDArray[np.float64] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): remove {directory} and start again to train this "
            "class anew."
        ) from error
    return scores


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


def _calibrate(run_directory: Path, data: PreparedData, progress: TrainProgress) -> None:
    """Fit the calibration on validation scores of the best models, and say the joint accuracy."""
    run = open_run(run_directory, finished=False)
    columns = [_best_validation_scores(run.class_directory(i)) for i in range(len(run.class_names))]
    log_likelihoods = np.stack([column for column in columns if column is not None], axis=1)
    log_prior = log_priors(run.class_counts, run.recipe.priors)
    num_tokens = data.validation.lengths.astype(np.int64) - 1
    labels = data.validation.labels
    calibration = fit_calibration(log_likelihoods, log_prior, num_tokens, labels)
    accuracy = float((predict(log_likelihoods, log_prior) == labels).mean())
    write_json(
        run_directory / CALIBRATION,
        {
            **calibration.to_json(),
            "joint_validation_accuracy": accuracy,
            "validation_documents": len(labels),
        },
    )
    progress.say(f"Joint validation accuracy {accuracy:.4f} on {len(labels)} documents")


def _describe_plan(
    recipe: TrainRecipe,
    data: PreparedData,
    model: LanguageModel,
    by_class: list[NDArray[np.int64]],
    steps: list[int],
    world_size: int,
) -> dict[str, Any]:
    parameters = list(model.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # Weights and two moments in fp32: what AdamW writes; the other optimizers write less.
    checkpoint_bytes = 12 * trained
    names = data.text.class_names
    return {
        "model": recipe.model,
        "dataset": recipe.dataset,
        "class_names": list(names),
        "class_counts": _class_counts(data),
        "validation_documents": len(data.validation.labels),
        "num_parameters": sum(p.numel() for p in parameters),
        "num_trainable_parameters": trained,
        "vocab_size": data.tokenizer.vocab_size,
        "steps_per_class": dict(zip(names, steps, strict=True)),
        "document_tokens_per_epoch": {
            name: int((data.train.lengths[indices].astype(np.int64) - 1).sum())
            for name, indices in zip(names, by_class, strict=True)
        },
        "global_batch_tokens": recipe.global_batch_tokens,
        "global_batch_size": recipe.global_batch_size,
        "micro_batch_tokens": recipe.micro_batch_tokens,
        "world_size": world_size,
        "checkpoint_bytes": checkpoint_bytes,
        "kept_bytes": len(names) * (checkpoint_bytes * (recipe.keep_checkpoints + 1) + 4 * trained),
        "truncated_documents": {
            "train": int(data.train.truncated.sum()),
            "validation": int(data.validation.truncated.sum()),
        },
        "data_source": data.text.source,
        "data_fingerprint": data.text.fingerprint,
        "data_treatments": [dataclasses.asdict(treatment) for treatment in data.text.treatments],
    }


def _announce(
    progress: TrainProgress, plan: dict[str, Any], run_directory: Path, accelerator: Any
) -> None:
    steps = sum(plan["steps_per_class"].values())
    where = str(accelerator.device)
    if accelerator.num_processes > 1:
        where = f"{accelerator.num_processes} processes ({where})"
    progress.say(
        f"{len(plan['class_names'])} models of {format_count(plan['num_parameters'])} parameters "
        f"({format_count(plan['num_trainable_parameters'])} trained), {steps} steps in all, on "
        f"{where}"
    )
    free = shutil.disk_usage(run_directory).free
    progress.say(
        f"A checkpoint is {format_bytes(plan['checkpoint_bytes'])}; the run keeps at most "
        f"{format_bytes(plan['kept_bytes'])} on the disk ({format_bytes(free)} free)"
    )
    for treatment in plan["data_treatments"]:
        progress.say(f"Data: {treatment['what']}")


def _environment() -> dict[str, object]:
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "gpus": ", ".join(gpus) or "none",
        "cuda": torch.version.cuda,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        **{package: installed(package) for package in _RECORDED_PACKAGES},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
