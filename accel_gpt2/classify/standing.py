"""How a run starts: where each of its parts stands, what is refused, and what is written first."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel_gpt2.classify.aside import make_way
from accel_gpt2.classify.describe import describe_environment
from accel_gpt2.classify.parts import Part, parts_of
from accel_gpt2.classify.prepare import PreparedData
from accel_gpt2.classify.run import (
    TRAINING_RECORD,
    read_training_record,
    write_recipe,
)
from accel_gpt2.data.batching import BATCHES_VERSION
from accel_gpt2.durable import make_directory, write_json, write_text, writing
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import FIELDS, WARNED_FIELDS, TrainRecipe, result_differences
from accel_gpt2.train.checkpoint import (
    Identity,
    inspect_checkpoint,
    mend_best,
    newest_checkpoint,
    read_identity,
    read_state,
    set_aside_newer,
)
from accel_gpt2.train.manifest import finish_replacing, verify

# Keys of the recipe that have another value now: key -> (before, now).
Changes = Mapping[str, tuple[object, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a part stands when a run starts, decided by the first process for all."""

    finished: bool
    checkpoint: Path | None  # whole; what to go on from
    skipped: tuple[str, ...] = ()  # what is wrong with newer ones
    changed: Changes = field(default_factory=dict)  # what it was trained with so far
    warnings: tuple[str, ...] = ()


def start_directory(
    run_directory: Path, recipe: TrainRecipe, data: PreparedData, *, resume: str
) -> list[Standing]:
    """Look at what is there, refuse what does not go together, and only then write.

    Raises:
        UserError: when a class cannot go on from what is there, or nothing can be written.
    """
    with writing(run_directory):
        make_directory(run_directory)
    make_way(run_directory, resume=resume)
    parts = parts_of(run_directory, recipe.objective, data.text.class_names)
    chosen = None if resume in {"auto", "never"} else _chosen_checkpoint(resume, len(parts))
    standings = []
    for part in parts:
        path = chosen[1] if chosen is not None and chosen[0] == part.index else None
        standing = standing_of(part, part_identity(recipe, data, part), recipe, chosen=path)
        if path is not None and standing.finished:
            raise UsageError(
                f"--resume {resume}: {part.name} is trained to the end already; give "
                f"--resume auto to go on with the others, or remove {part.finals[0]}."
            )
        standings.append(standing)
    standings = _with_warnings(run_directory, [part.name for part in parts], standings)
    for part, standing in zip(parts, standings, strict=True):
        directory = part.directory
        for folder in (directory, *(final.parent for final in part.finals)):
            with writing(folder):
                make_directory(folder)
        if not standing.finished:
            state = None if standing.checkpoint is None else read_state(standing.checkpoint)[0]
            set_aside_newer(directory, -1 if state is None else state.step)
            mend_best(directory, -1 if state is None else state.best_step)
    write_recipe(run_directory, recipe)
    if not (run_directory / "command.txt").is_file():
        write_text(run_directory / "command.txt", shlex.join(sys.argv) + "\n")
    write_json(run_directory / "environment.json", describe_environment())
    with writing(run_directory / "tokenizer"):
        data.tokenizer.save(run_directory / "tokenizer")
    return standings


def part_identity(recipe: TrainRecipe, data: PreparedData, part: Part) -> Identity:
    """What a part's checkpoints and models belong to."""
    recipe_values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(recipe).items()
    }
    return Identity(
        class_index=part.index,
        class_name=part.name,
        data_fingerprint=data.text.fingerprint,
        tokenizer_fingerprint=data.tokenizer.fingerprint,
        batches=BATCHES_VERSION,
        recipe=recipe_values,
    )


def _changes(there: Identity, here: Identity, recipe: TrainRecipe, path: Path) -> Changes:
    """What has changed of what may change between the work in `path` and now.

    Raises:
        UserError: when work under the one identity cannot go on under the other.
    """
    problems = []
    if (there.class_index, there.class_name) != (here.class_index, here.class_name):
        problems.append(f"it is of class {there.class_name!r}, not {here.class_name!r}")
    if there.data_fingerprint != here.data_fingerprint:
        problems.append("the training text has changed since")
    if there.tokenizer_fingerprint != here.tokenizer_fingerprint:
        problems.append("the tokenizer has changed since")
    if there.batches != here.batches:
        problems.append("another version of accel-gpt2 made its batches, of other documents")
    old_values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in there.recipe.items()
        if key in FIELDS
    }
    changes = result_differences(dataclasses.replace(recipe, **old_values), recipe)
    problems += [
        f"{key} was {before!r} and is {now!r}"
        for key, (before, now) in changes.items()
        if key not in WARNED_FIELDS
    ]
    if problems:
        raise UserError(
            f"{path} does not go on from here: {'; '.join(problems)}. Give the earlier values, "
            "--resume never to start anew (what is there is kept beside), or another --output-dir."
        )
    return changes


def standing_of(
    part: Part, identity: Identity, recipe: TrainRecipe, *, chosen: Path | None = None
) -> Standing:
    """Where a part stands that nobody trains; damage is passed over, what does not belong here is
    refused.

    Args:
        chosen: the checkpoint to go on from; None for the newest whole one.

    Raises:
        UserError: when what there is cannot be gone on from, or nothing of it is whole.
    """
    directory = part.directory
    problems: list[str] = []
    for folder in (directory, *(final.parent for final in part.finals)):
        with writing(folder):
            finish_replacing(folder)
    if all(final.is_dir() for final in part.finals):
        try:
            for final in part.finals:
                verify(final)
        except UserError as error:
            problems.append(str(error))  # it is exported again, from the checkpoints
        else:
            final = part.finals[0]
            record = read_training_record(final).identity
            there = read_identity(record, final / TRAINING_RECORD)
            changed = _changes(there, identity, recipe, final)
            return Standing(finished=True, checkpoint=None, changed=changed)
    checkpoint = chosen
    if checkpoint is None:
        checkpoint, damaged = newest_checkpoint(directory)
        problems += damaged
    if checkpoint is None and problems:
        raise UserError(
            f"Nothing in {directory} is whole. {' '.join(problems)} Put a good copy in place, give "
            "--resume with the path of one, or --resume never to start anew (what is there is kept "
            "beside)."
        )
    changed = {}
    if checkpoint is not None:
        changed = _changes(inspect_checkpoint(checkpoint)[1], identity, recipe, checkpoint)
    return Standing(finished=False, checkpoint=checkpoint, skipped=tuple(problems), changed=changed)


def _with_warnings(
    run_directory: Path, names: Sequence[str], standings: list[Standing]
) -> list[Standing]:
    """Have each class that was trained with other values say so.

    Raises:
        UsageError: when all classes are finished, so that the new values would change nothing.
    """
    if all(standing.finished or _steps_left(standing) == 0 for standing in standings):
        changes = {key: pair for x in standings for key, pair in x.changed.items()}
        if changes:
            raise UsageError(
                f"The run in {run_directory} is trained to the end with {_were(changes)}: another "
                "value would change nothing. Give --resume never to train anew (what is there is "
                "kept beside), or another --output-dir."
            )
    return [
        dataclasses.replace(standing, warnings=(_warning(name, standing),))
        if standing.changed
        else standing
        for name, standing in zip(names, standings, strict=True)
    ]


def _steps_left(standing: Standing) -> int | None:
    """None where no checkpoint tells it."""
    if standing.checkpoint is None:
        return None
    state, _ = read_state(standing.checkpoint)
    return state.total_steps - state.step


def _warning(name: str, standing: Standing) -> str:
    now = ", ".join(f"{key} = {now!r}" for key, (_, now) in standing.changed.items())
    if standing.finished or _steps_left(standing) == 0:
        return (
            f"{name} was trained to the end with {_were(standing.changed)}, and what is trained "
            f"from now on has {now}: the classes are not trained alike. --resume never trains all "
            "of them anew."
        )
    assert standing.checkpoint is not None, "without one there is nothing to differ from"
    step = read_state(standing.checkpoint)[0].step
    before = _were(standing.changed)
    return f"{name} was trained with {before} up to step {step}, and goes on with {now}."


def _were(changes: Changes) -> str:
    return ", ".join(f"{key} = {before!r}" for key, (before, _) in changes.items())


def _chosen_checkpoint(resume: str, num_parts: int) -> tuple[int, Path]:
    path = Path(resume).resolve()  # `best` is a link that moves on
    if not resume or not os.path.isdir(path):
        raise UsageError(f"--resume {resume}: give auto, never, or a checkpoint directory.")
    verify(path)
    if not (path / "state.json").is_file():
        raise UsageError(
            f"--resume {resume}: it is no checkpoint; give a checkpoint-... directory."
        )
    class_index = read_state(path)[1].class_index
    if class_index >= num_parts:
        raise UsageError(f"--resume {resume}: it is of a class that this data set has not got.")
    return class_index, path
