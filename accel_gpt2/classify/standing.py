"""How a run starts: where each class stands, what is refused, and what is written first."""

import dataclasses
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_gpt2.classify.describe import describe_environment
from accel_gpt2.classify.prepare import PreparedData
from accel_gpt2.classify.run import CALIBRATION, TRAINING_RECORD, class_directory
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import TrainRecipe, result_differences, to_yaml
from accel_gpt2.train.checkpoint import (
    Identity,
    is_whole,
    newest_checkpoint,
    read_state,
    set_aside_newer,
    verify,
    write_json,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a class stands when a run starts, decided by the first process for all."""

    finished: bool
    checkpoint: Path | None  # whole; what to go on from
    skipped: tuple[str, ...]  # what is wrong with newer ones


def start_directory(
    run_directory: Path, recipe: TrainRecipe, data: PreparedData, *, resume: str
) -> list[Standing]:
    """Look at what is there, refuse what does not go together, and only then write."""
    run_directory.mkdir(parents=True, exist_ok=True)
    if resume == "never":
        _move_aside(run_directory)
    names = data.text.class_names
    directories = class_directories(run_directory, data)
    chosen = None if resume in {"auto", "never"} else _chosen_checkpoint(resume, len(names))
    standings = []
    for index, directory in enumerate(directories):
        identity = class_identity(recipe, data, index)
        standing = _standing(directory, identity, recipe)
        if chosen is not None and chosen[0] == index:
            if standing.finished:
                raise UsageError(
                    f"--resume {resume}: {names[index]} is trained to the end already; give "
                    f"--resume auto to go on with the others, or remove {directory / 'final'}."
                )
            _check_identity(read_state(chosen[1])[1], identity, recipe, chosen[1])
            standing = Standing(finished=False, checkpoint=chosen[1], skipped=())
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


def class_directories(run_directory: Path, data: PreparedData) -> list[Path]:
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


def class_identity(recipe: TrainRecipe, data: PreparedData, index: int) -> Identity:
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


def _standing(directory: Path, identity: Identity, recipe: TrainRecipe) -> Standing:
    final = directory / "final"
    if is_whole(final):
        record = json.loads((final / TRAINING_RECORD).read_text(encoding="utf-8"))
        _check_identity(Identity(**record["identity"]), identity, recipe, final)
        return Standing(finished=True, checkpoint=None, skipped=())
    # A damaged `final/` is exported again, from the checkpoints.
    checkpoint, problems = newest_checkpoint(directory)
    if checkpoint is not None:
        _check_identity(read_state(checkpoint)[1], identity, recipe, checkpoint)
    return Standing(finished=False, checkpoint=checkpoint, skipped=tuple(problems))


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
