"""Checkpoints that are whole or not there.

A checkpoint is written to a staging folder on the same file system, every file flushed to the disk,
`manifest.json` with sizes and sha256 last, and only then renamed to `checkpoint-<step>`. Nothing
older is removed before that. Whatever a crash leaves is either a staging folder, which is never
read, or a whole checkpoint. Nothing is unpickled on reading: tensors are safetensors, the rest is
JSON, and the optimizer's state goes through torch's weights-only reader. Only files that the
manifest lists are read.
"""

import collections
import contextlib
import dataclasses
import errno
import io
import itertools
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pydantic_core
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from accel_gpt2.durable import (
    STAGING_PREFIX,
    flush_directory,
    json_text,
    make_directory,
    remove,
    write_bytes,
    writing,
)
from accel_gpt2.errors import UserError
from accel_gpt2.train.manifest import (
    finish_replacing,
    first_problem,
    listed_file,
    read_json,
    read_manifest,
    staged_directory,
    verify,
)
from accel_gpt2.units import format_bytes

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")

Count = Annotated[int, Ge(0)]


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Where the training of one class stands: the one mutable type of the loop."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True, "extra": "forbid"}

    step: Count = 0  # optimizer steps done
    total_steps: Count = 0  # of the whole training, so that a resumed run need not count them
    epoch: Count = 0
    batch: Count = 0  # global batches of this epoch that are done
    tokens: Count = 0  # document tokens trained on, padding not counted
    seconds: float = 0.0  # spent training this class, over all starts
    evaluated_step: int = -1  # the last step that was evaluated
    best_step: int = -1
    best_loss_bits: float = float(
        "inf"
    )  # on validation: per token, or per document of a classifier
    peak_memory_bytes: Count = 0
    loss_sum: float = 0.0  # since the last log line, so that a resumed run logs the same numbers
    loss_targets: Count = 0
    skipped_steps: Count = 0  # that changed nothing: see `nonfinite`
    bad_steps_in_a_row: Count = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a checkpoint belongs to; a run goes on only from a checkpoint of the same identity.

    `batches` is `data.batching.BATCHES_VERSION`: a place in an epoch means other documents under
    another. Files from before it was written down are of the first.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True, "extra": "forbid"}

    class_index: Count
    class_name: str
    data_fingerprint: str
    tokenizer_fingerprint: str
    batches: Count = 1
    recipe: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is read back."""

    state: TrainState
    identity: Identity
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    random_states: list[dict[str, Tensor]]  # by rank


@dataclass(frozen=True, slots=True, kw_only=True)
class _StateFile:
    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True, "extra": "forbid"}

    state: TrainState
    identity: Identity


_STATE_READER = TypeAdapter(_StateFile)
_IDENTITY_READER = TypeAdapter(Identity)


def checkpoint_path(class_directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is, if there is one."""
    return class_directory / f"checkpoint-{step}"


def save_checkpoint(
    class_directory: Path,
    *,
    state: TrainState,
    identity: Identity,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    random_states: list[dict[str, Tensor]],
) -> Path:
    """Write `checkpoint-<step>` whole, and return its path.

    Raises:
        UserError: when the disk has not enough room; nothing was touched then.
    """
    target = checkpoint_path(class_directory, state.step)
    state_json = json_text(
        {"state": dataclasses.asdict(state), "identity": dataclasses.asdict(identity)}
    )
    with writing(target):
        make_directory(class_directory)
        _remove_leftovers(class_directory)  # they may be as large as what comes
    _check_free_space(
        class_directory,
        checkpoint_bytes(weights, optimizer, random_states) + len(state_json.encode()),
    )
    with staged_directory(target) as staging:
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()}, staging / MODEL_FILE
        )
        with (staging / OPTIMIZER_FILE).open("wb") as file:
            torch.save(dict(optimizer), file)
        for rank, random_state in enumerate(random_states):
            save_file(random_state, staging / _random_file(rank))
        (staging / STATE_FILE).write_text(state_json, encoding="utf-8")
    return target


def checkpoint_bytes(
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    random_states: list[dict[str, Tensor]],
) -> int:
    """What a checkpoint takes on the disk beside its state.json, or a little more.

    Tensors are counted exactly; for names, shapes and paddings stands what they take at most.
    """
    files = [weights, *random_states]
    safetensors = sum(
        tensor.nbytes + len(name) + _HEADER_BYTES for file in files for name, tensor in file.items()
    )
    storages = {
        (storage.device, storage.data_ptr()): storage.nbytes()
        for _, tensor in _named_tensors(optimizer)
        for storage in [tensor.untyped_storage()]
    }
    pickled = sum(storages.values()) + len(storages) * _PICKLED_STORAGE_BYTES
    # Each file, the folder and the manifest's end take up to a block more than they hold.
    return safetensors + pickled + (len(files) + 4) * _BLOCK_BYTES


_BLOCK_BYTES = 4096
_HEADER_BYTES = 96  # of a tensor in safetensors' header, beside its name
_PICKLED_STORAGE_BYTES = 400  # beside a tensor in a file of torch: zip entries, padding, pickle


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint that `verify` has passed.

    Raises:
        UserError: when a file does not hold what belongs into it.
    """
    state, identity = read_state(directory)
    weights = read_weights(directory)
    shapes = [tuple(tensor.shape) for tensor in weights.values()]
    return Checkpoint(
        state=state,
        identity=identity,
        weights=weights,
        optimizer=_read_optimizer(directory, shapes),
        random_states=_read_random_states(directory),
    )


def inspect_checkpoint(directory: Path) -> tuple[TrainState, Identity]:
    """`read_checkpoint` without holding its tensors, for one that `verify` has passed.

    Raises:
        UserError: when a file does not hold what belongs into it.
    """
    state, identity = read_state(directory)
    path = listed_file(directory, MODEL_FILE)
    with _reading(path), safe_open(path, framework="pt") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    _read_optimizer(directory, shapes)
    _read_random_states(directory)
    return state, identity


def read_state(directory: Path) -> tuple[TrainState, Identity]:
    """Where a checkpoint stands and what it belongs to.

    Raises:
        UserError: when its state.json does not hold exactly that.
    """
    path = listed_file(directory, STATE_FILE)
    content = read_json(_STATE_READER, path)
    step, total_steps = content.state.step, content.state.total_steps
    if step > total_steps:
        raise UserError(f"{path} cannot be read: it is at step {step} of {total_steps}.")
    match = _NAME.fullmatch(directory.name)
    if match is not None and int(match[1]) != step:
        raise UserError(
            f"{directory} holds step {step}: it was renamed or copied. Give it its own name back, "
            "or remove it."
        )
    return content.state, content.identity


def read_identity(content: object, path: Path) -> Identity:
    """An Identity from JSON that was read from `path`.

    Raises:
        UserError: when it is none.
    """
    try:
        return _IDENTITY_READER.validate_json(pydantic_core.to_json(content))
    except ValidationError as error:
        raise UserError(f"{path} cannot be read: {first_problem(error)}.") from None


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The trained parameters of a checkpoint, by name.

    Raises:
        UserError: when the file is not of safetensors.
    """
    path = listed_file(directory, MODEL_FILE)
    with _reading(path):
        return load_file(path)


def _read_random_states(directory: Path) -> list[dict[str, Tensor]]:
    """By rank, as many as the manifest lists without a gap."""
    names = read_manifest(directory).files
    states = []
    size = torch.get_rng_state().shape
    for rank in itertools.count():
        if _random_file(rank) not in names:
            break
        path = directory / _random_file(rank)
        with _reading(path):
            state = load_file(path)
        own = state.get("cpu")
        if own is None or own.dtype != torch.uint8 or own.shape != size:
            raise UserError(f"{path} does not hold the state of torch's random numbers.")
        states.append(state)
    if not states:
        raise UserError(f"{directory} is not a checkpoint: it has no {_random_file(0)}.")
    return states


def _random_file(rank: int) -> str:
    return f"random-{rank}.safetensors"


def _read_optimizer(directory: Path, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """The optimizer's state, checked to be one of parameters of these shapes.

    It is mapped into memory: every rank reads the whole of it, and many keep a share.
    """
    path = listed_file(directory, OPTIMIZER_FILE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are refused
            content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # of a dozen kinds, none of them documented
        raise UserError(
            f"{path} cannot be read as tensors and plain values ({type(error).__name__}), and "
            "nothing else is taken from a checkpoint."
        ) from error
    if not _is_optimizer_state(content, shapes):
        raise UserError(
            f"{path} is not the state of an optimizer of the {len(shapes)} tensors in {MODEL_FILE}."
        )
    return dict(content)


def _is_optimizer_state(content: object, shapes: list[tuple[int, ...]]) -> bool:
    try:
        state, groups = content["optimizer"]["state"], content["optimizer"]["param_groups"]  # type: ignore[index]
        scaler = content["scaler"]  # type: ignore[index]
        indices = sorted(index for group in groups for index in group["params"])
        known = indices == list(range(len(shapes))) and set(state) <= set(indices)
        # Moments and compensations are of a parameter's shape; factored ones have their own.
        moments = collections.defaultdict(list)
        for name, tensor in _named_tensors(state):
            if name in {"exp_avg", "exp_avg_sq", "state1", "state2", "compensation"}:
                moments[name].append(tuple(tensor.shape))
    except (KeyError, TypeError, IndexError):
        return False
    own = collections.Counter(shapes)
    fits = all(not collections.Counter(of_one) - own for of_one in moments.values())
    return known and fits and isinstance(scaler, dict | None)


def _named_tensors(tree: object) -> Iterator[tuple[object, Tensor]]:
    """Every tensor in nested mappings, with the key that it has in the innermost."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if isinstance(value, Tensor):
                yield key, value
            else:
                yield from _named_tensors(value)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def list_checkpoints(class_directory: Path) -> list[Path]:
    """Every `checkpoint-<step>`, newest step first; staging folders are not among them.

    Raises:
        UserError: when the folder cannot be read; that is not the same as having no checkpoints.
    """
    try:
        names = os.listdir(class_directory)  # a glob would hide that the folder cannot be read
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise UserError(f"{class_directory} cannot be read: {error.strerror or error}.") from None
    found = {
        int(match[1]): class_directory / name
        for name in names
        if (match := _NAME.fullmatch(name)) and (class_directory / name).is_dir()
    }
    return [found[step] for step in sorted(found, reverse=True)]


def newest_checkpoint(class_directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with any newer one.

    Leftovers of a killed process go first: after its last save no other would clear them away, and
    they may be as large as a checkpoint.
    """
    with writing(class_directory):
        _remove_leftovers(class_directory)
    problems: list[str] = []
    for directory in list_checkpoints(class_directory):
        try:
            verify(directory)
            return directory, problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def set_aside_newer(class_directory: Path, step: int) -> None:
    """Rename checkpoints after `step` to `superseded-checkpoint-...`.

    They are damaged, or the user went back to before them. Rotation would take them for the newest
    and remove what is written from here on; a later start would go on from them.
    """
    link = class_directory / "best"
    for directory in list_checkpoints(class_directory):
        if int(directory.name.split("-")[1]) > step:
            with writing(directory):
                if link.is_symlink() and link.readlink() == Path(directory.name):
                    link.unlink()
                directory.replace(_free_name(f"superseded-{directory.name}", class_directory))
                flush_directory(class_directory)


def _free_name(name: str, folder: Path) -> Path:
    numbered = (folder / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    return next(path for path in numbered if not os.path.lexists(path))


def point_best_at(checkpoint: Path) -> None:
    """Make `best` beside a checkpoint a link to it, replaced in one step.

    A person's convenience, which a file system without links goes without: what counts is the best
    step in state.json.
    """
    link = checkpoint.parent / "best"
    fresh = checkpoint.parent / f"{STAGING_PREFIX}best"
    with writing(link):
        remove(fresh)
        try:
            fresh.symlink_to(checkpoint.name)
        except OSError as error:
            if error.errno in _NO_LINKS:
                return
            raise
        fresh.replace(link)
        flush_directory(checkpoint.parent)


def mend_best(class_directory: Path, best_step: int) -> None:
    """Have `best` lead to the best step's checkpoint, or to nothing where that is gone.

    A kill between a save and the link, or a way back to an earlier step, leaves it behind.
    """
    best = checkpoint_path(class_directory, best_step)
    link = class_directory / "best"
    if best.is_dir():
        point_best_at(best)
    elif link.is_symlink():
        with writing(link):
            link.unlink()


# What a file system without links answers, and Windows without the right to make them.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


def rotate(class_directory: Path, *, keep: int, best_step: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one, and stale staging folders."""
    with writing(class_directory):
        _remove_leftovers(class_directory)
        for directory in list_checkpoints(class_directory)[keep:]:
            if directory != checkpoint_path(class_directory, best_step):
                # Under another name first, so that what is half removed is no checkpoint.
                removed = directory.with_name(f"{STAGING_PREFIX}removed-{directory.name}")
                directory.replace(removed)
                flush_directory(class_directory)
                remove(removed)


def _remove_leftovers(class_directory: Path) -> None:
    finish_replacing(class_directory)
    for leftover in class_directory.glob(f"{STAGING_PREFIX}*"):
        remove(leftover)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """A `.npy` file, flushed to the disk, whole or not at all; its folder is made if need be.

    Raises:
        UserError: when it cannot be written.
    """
    buffer = io.BytesIO()  # numpy's own writing to a file does not say why it failed
    np.save(buffer, array)
    with writing(path):
        make_directory(path.parent)
    write_bytes(path, buffer.getvalue())


def _check_free_space(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise UserError(
            f"The next checkpoint needs {format_bytes(num_bytes)} in {directory}, and "
            f"{format_bytes(free)} are free. What was saved before is intact; make room and start "
            "again to go on."
        )
