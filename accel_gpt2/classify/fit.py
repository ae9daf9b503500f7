"""One language model per class: the launched process's whole job, from text to `final/` folders."""

import contextlib
import dataclasses
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from accel_gpt2.classify.bayes import log_priors, predict
from accel_gpt2.classify.calibration import fit_calibration
from accel_gpt2.classify.card import write_card
from accel_gpt2.classify.run import Run, class_directory, open_run
from accel_gpt2.data.cache import cache_directory
from accel_gpt2.data.sources import TextData, load_text_data
from accel_gpt2.data.tokenized import TokenizedDocuments, tokenize_documents
from accel_gpt2.data.tokenizer import TextTokenizer, load_tokenizer
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import ResolvedRecipe, TrainRecipe, result_differences, to_yaml
from accel_gpt2.train.checkpoint import (
    MANIFEST,
    Checkpoint,
    Identity,
    TrainState,
    newest_checkpoint,
    publish_directory,
    read_checkpoint,
    verify,
    write_json,
)
from accel_gpt2.train.loop import (
    BatchSchedule,
    ClassTraining,
    append_json_line,
    train_class,
    validation_scores_path,
)
from accel_gpt2.train.model import LanguageModel, build_model
from accel_gpt2.train.processes import build_accelerator, current_gpu, is_first_process
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.stopping import StopRequest
from accel_gpt2.units import format_bytes, format_count

TRAINING_RECORD = "training.json"

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
        data = prepare_data(recipe, progress=talks and not quiet)
        accelerator = build_accelerator(recipe, run_directory)
        if talks:
            _start_directory(run_directory, recipe, data, resume=resume)
        accelerator.wait_for_everyone()
        with TrainProgress(shown=talks, quiet=quiet) as progress:
            _fit_classes(
                recipe,
                run_directory,
                data,
                accelerator,
                stop=stop,
                progress=progress,
                resume=resume,
            )
        for tracker in accelerator.trackers:
            tracker.finish()


def prepare_data(recipe: TrainRecipe, *, progress: bool) -> PreparedData:
    """Read, clean, split and tokenise the recipe's training data, or take it from the cache.

    It happens before the processes meet, so that no collective waits for it; the first process of
    a machine does the work and the others read its cache.
    """
    with _one_at_a_time():
        text = load_text_data(recipe, progress=progress)
        tokenizer = load_tokenizer(recipe, text.train["text"], progress=progress)
        train, validation = (
            tokenize_documents(
                split, tokenizer, recipe.max_length, description=name, progress=progress
            )
            for name, split in (("train", text.train), ("validation", text.validation))
        )
    return PreparedData(text=text, tokenizer=tokenizer, train=train, validation=validation)


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from filelock import FileLock

    cache_directory().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_directory() / "prepare.lock"):
        yield


def _start_directory(
    run_directory: Path, recipe: TrainRecipe, data: PreparedData, *, resume: str
) -> None:
    run_directory.mkdir(parents=True, exist_ok=True)
    if resume == "never":
        _move_aside(run_directory)
    (run_directory / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    if not (run_directory / "command.txt").is_file():
        (run_directory / "command.txt").write_text(shlex.join(sys.argv) + "\n", encoding="utf-8")
    write_json(run_directory / "environment.json", _environment())
    data.tokenizer.save(run_directory / "tokenizer")


def _move_aside(run_directory: Path) -> None:
    """Results of an earlier run are kept, under a name that says when they were put there."""
    old = [*run_directory.glob("class-*"), *run_directory.glob("evaluation*")]
    old += [run_directory / name for name in ("log.jsonl", "calibration.json", "trackers")]
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
    accelerator: Any,
    *,
    stop: StopRequest,
    progress: TrainProgress,
    resume: str,
) -> None:
    names = data.text.class_names
    directories = [class_directory(run_directory, i, name) for i, name in enumerate(names)]
    identities = [_identity(recipe, data, index) for index in range(len(names))]
    by_class = [data.train.for_class(index) for index in range(len(names))]
    steps = [BatchSchedule(data.train.lengths[indices], recipe).total_steps for indices in by_class]
    finished = [
        _is_finished(directory, identity, recipe)
        for directory, identity in zip(directories, identities, strict=True)
    ]
    stop.saving = any(finished)
    chosen = _chosen_checkpoint(resume, len(names))
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
    for index, name in enumerate(names):
        if finished[index]:
            progress.say(f"{name} ({index + 1}/{len(names)}) is trained already")
            continue
        directory, identity = directories[index], identities[index]
        if accelerator.is_main_process:
            directory.mkdir(exist_ok=True)
        checkpoint = _checkpoint_for(
            directory, identity, recipe, chosen if chosen and chosen[0] == index else None, progress
        )
        model = build_model(
            recipe,
            vocab_size=data.tokenizer.vocab_size,
            eos_token_id=data.tokenizer.eos_token_id,
        )
        if not described:
            described = True
            plan = _describe_plan(recipe, data, model, by_class, steps, accelerator.num_processes)
            if accelerator.is_main_process:
                write_json(run_directory / "plan.json", plan)
                write_card(run_directory, recipe, plan, metrics=None)
            _announce(progress, plan, accelerator)
        job = ClassTraining(
            identity=identity,
            directory=directory,
            documents=data.train.select(by_class[index]),
            validation=data.validation,
            model=model,
            checkpoint=checkpoint,
            joint_accuracy=_joint_accuracy(index, directories, data, recipe),
            num_classes=len(names),
            earlier_seconds=sum(_training_seconds(directory) for directory in directories),
            later_steps=sum(
                count for later, count in enumerate(steps) if later > index and not finished[later]
            ),
        )
        event = "start" if checkpoint is None else "resume"
        step = 0 if checkpoint is None else checkpoint.state.step
        log({"event": event, "class_index": index, "class_name": name, "step": step})
        state = train_class(
            job, recipe, accelerator=accelerator, gpu=gpu, stop=stop, progress=progress, log=log
        )
        if accelerator.is_main_process:
            _publish_final(job, data.tokenizer, state)
        accelerator.wait_for_everyone()
        log({"event": "finish", "class_index": index, "class_name": name, "step": state.step})
        accelerator.free_memory()
        del model, job
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if accelerator.is_main_process:
        _calibrate(open_run(run_directory), data, progress)
    accelerator.wait_for_everyone()


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


def _is_finished(directory: Path, identity: Identity, recipe: TrainRecipe) -> bool:
    final = directory / "final"
    if not (final / MANIFEST).is_file():
        return False
    try:
        verify(final)
    except UserError:
        return False  # damaged: exported again from the checkpoints
    record = json.loads((final / TRAINING_RECORD).read_text(encoding="utf-8"))
    _check_identity(Identity(**record["identity"]), identity, recipe, final)
    return True


def _chosen_checkpoint(resume: str, num_classes: int) -> tuple[int, Checkpoint] | None:
    if resume in {"auto", "never"}:
        return None
    path = Path(resume)
    if not path.is_dir():
        raise UsageError(f"--resume {resume}: give auto, never, or a checkpoint directory.")
    checkpoint = read_checkpoint(path)
    if checkpoint.identity.class_index >= num_classes:
        raise UsageError(f"--resume {resume}: it is of a class that this data set has not got.")
    return checkpoint.identity.class_index, checkpoint


def _checkpoint_for(
    directory: Path,
    identity: Identity,
    recipe: TrainRecipe,
    chosen: tuple[int, Checkpoint] | None,
    progress: TrainProgress,
) -> Checkpoint | None:
    if chosen is not None:
        checkpoint: Checkpoint | None = chosen[1]
    else:
        checkpoint, problems = newest_checkpoint(directory)
        for problem in problems:
            progress.say(f"Skipped: {problem}")
    if checkpoint is None:
        return None
    path = directory / f"checkpoint-{checkpoint.state.step}"
    _check_identity(checkpoint.identity, identity, recipe, path)
    progress.say(f"{identity.class_name} goes on from {path}")
    return checkpoint


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


def _class_counts(data: PreparedData) -> list[int]:
    return [int(n) for n in np.bincount(data.train.labels, minlength=len(data.text.class_names))]


def _best_validation_scores(directory: Path) -> NDArray[np.float64] | None:
    record = directory / "final" / TRAINING_RECORD
    if not record.is_file():
        return None
    best_step = json.loads(record.read_text(encoding="utf-8"))["best_step"]
    scores: NDArray[np.float64] = np.load(validation_scores_path(directory, best_step))
    return scores


def _training_seconds(directory: Path) -> float:
    record = directory / "final" / TRAINING_RECORD
    if not record.is_file():
        return 0.0
    return float(json.loads(record.read_text(encoding="utf-8"))["seconds"])


def _publish_final(job: ClassTraining, tokenizer: TextTokenizer, state: TrainState) -> None:
    """Write `final/` from the best checkpoint: a model that transformers or peft loads as it is."""
    best = read_checkpoint(job.directory / "best")
    job.model.load_trainable_state(best.weights)

    def write(staging: Path) -> None:
        job.model.save_pretrained(staging)
        tokenizer.save(staging)
        record = {
            "class_index": job.identity.class_index,
            "class_name": job.identity.class_name,
            "best_step": best.state.step,
            "best_bits_per_token": best.state.best_bits_per_token,
            "steps": state.step,
            "document_tokens": state.tokens,
            "seconds": state.seconds,
            "peak_memory_bytes": state.peak_memory_bytes,
            "identity": dataclasses.asdict(job.identity),
        }
        write_json(staging / TRAINING_RECORD, record)

    publish_directory(job.directory / "final", write)


def _calibrate(run: Run, data: PreparedData, progress: TrainProgress) -> None:
    """Fit the calibration on validation scores of the best models, and log the joint accuracy."""
    columns = [_best_validation_scores(run.class_directory(i)) for i in range(len(run.class_names))]
    log_likelihoods = np.stack([column for column in columns if column is not None], axis=1)
    log_prior = log_priors(run.class_counts, run.recipe.priors)
    num_tokens = data.validation.lengths.astype(np.int64) - 1
    labels = data.validation.labels
    calibration = fit_calibration(log_likelihoods, log_prior, num_tokens, labels)
    accuracy = float((predict(log_likelihoods, log_prior) == labels).mean())
    write_json(
        run.directory / "calibration.json",
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


def _announce(progress: TrainProgress, plan: dict[str, Any], accelerator: Any) -> None:
    steps = sum(plan["steps_per_class"].values())
    where = str(accelerator.device)
    if accelerator.num_processes > 1:
        where = f"{accelerator.num_processes} processes ({where})"
    progress.say(
        f"{len(plan['class_names'])} models of {format_count(plan['num_parameters'])} parameters "
        f"({format_count(plan['num_trainable_parameters'])} trained), {steps} steps in all, on "
        f"{where}"
    )
    free = shutil.disk_usage(Path.cwd()).free
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
