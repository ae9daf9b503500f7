"""Checkpoints that are whole or not there.

A checkpoint is written to a staging folder on the same file system, every file flushed to the disk,
`manifest.json` with sizes and sha256 last, and only then renamed to `checkpoint-<step>`. Nothing
older is removed before that. Whatever a crash leaves is either a staging folder, which is never
read, or a whole checkpoint. Nothing is unpickled on reading: tensors are safetensors, the rest is
JSON, and the optimizer's state goes through torch's weights-only reader.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from accel_gpt2.errors import UserError
from accel_gpt2.units import format_bytes

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_STAGING_PREFIX = ".staging-"
_REPLACED_PREFIX = f"{_STAGING_PREFIX}replaced-"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Where the training of one class stands: the one mutable type of the loop."""

    step: int = 0  # optimizer steps done
    total_steps: int = 0  # of the whole training, so that a resumed run need not count them
    epoch: int = 0
    batch: int = 0  # global batches of this epoch that are done
    tokens: int = 0  # document tokens trained on, padding not counted
    seconds: float = 0.0  # spent training this class, over all starts
    evaluated_step: int = -1  # the last step that was evaluated
    best_step: int = -1
    best_bits_per_token: float = float("inf")
    peak_memory_bytes: int = 0
    loss_sum: float = 0.0  # since the last log line, so that a resumed run logs the same numbers
    loss_tokens: int = 0
    skipped_steps: int = 0  # that changed nothing: see `nonfinite`
    bad_steps_in_a_row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a checkpoint belongs to; a run goes on only from a checkpoint of the same identity."""

    class_index: int
    class_name: str
    data_fingerprint: str
    tokenizer_fingerprint: str
    recipe: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is read back."""

    state: TrainState
    identity: Identity
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    random_states: list[dict[str, Tensor]]  # by rank


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
    tensor_bytes = sum(tensor.nbytes for tensor in weights.values()) + _tensor_bytes(optimizer)
    _check_free_space(class_directory, tensor_bytes)
    with _staged(target) as staging:
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()},
            staging / "model.safetensors",
        )
        try:
            torch.save(dict(optimizer), staging / "optimizer.pt")
        except RuntimeError as error:  # what torch makes of a failed write
            raise OSError(f"optimizer.pt is cut short, as on a full disk ({error})") from error
        for rank, random_state in enumerate(random_states):
            save_file(random_state, staging / f"random-{rank}.safetensors")
        write_json(
            staging / "state.json",
            {"state": dataclasses.asdict(state), "identity": dataclasses.asdict(identity)},
        )
    return target


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint that `verify` has passed."""
    state, identity = read_state(directory)
    ranks = sorted(
        directory.glob("random-*.safetensors"), key=lambda path: int(path.stem.split("-")[1])
    )
    return Checkpoint(
        state=state,
        identity=identity,
        weights=read_weights(directory),
        optimizer=torch.load(directory / "optimizer.pt", weights_only=True, map_location="cpu"),
        random_states=[load_file(path) for path in ranks],
    )


def read_state(directory: Path) -> tuple[TrainState, Identity]:
    """Where a checkpoint stands and what it belongs to."""
    content = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    return TrainState(**content["state"]), Identity(**content["identity"])


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The trained parameters of a checkpoint, by name."""
    return load_file(directory / "model.safetensors")


def verify(directory: Path) -> None:
    """Check every file of a checkpoint or `final/` against its manifest.

    Raises:
        UserError: naming what is wrong.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        files = {
            str(name): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
    except FileNotFoundError:
        raise UserError(f"{directory} is not whole: it has no {MANIFEST}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__} {error}.") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{directory} has format {version}; this version of accel-gpt2 reads {FORMAT_VERSION}."
        )
    for name, (num_bytes, sha256) in files.items():
        file = directory / name
        if directory.resolve() not in file.resolve().parents or not file.is_file():
            raise UserError(f"{directory} is damaged: {name} is missing.")
        if file.stat().st_size != num_bytes:
            raise UserError(
                f"{directory} is damaged: {name} has {file.stat().st_size} bytes, "
                f"{num_bytes} were written."
            )
        try:
            found = _sha256(file)
        except OSError as error:
            raise UserError(f"{directory} is damaged: {name} cannot be read: {error}.") from None
        if found != sha256:
            raise UserError(f"{directory} is damaged: the content of {name} has changed.")


def is_whole(directory: Path) -> bool:
    """Whether `verify` passes."""
    try:
        verify(directory)
    except UserError:
        return False
    return True


def list_checkpoints(class_directory: Path) -> list[Path]:
    """Every `checkpoint-<step>`, newest step first; staging folders are not among them."""
    found = {
        int(match[1]): path
        for path in class_directory.glob("checkpoint-*")
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found, reverse=True)]


def newest_checkpoint(class_directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with any newer one."""
    _finish_replacing(class_directory)
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
    for directory in list_checkpoints(class_directory):
        if int(directory.name.split("-")[1]) > step:
            superseded = directory.with_name(f"superseded-{directory.name}")
            shutil.rmtree(superseded, ignore_errors=True)
            directory.replace(superseded)


def point_best_at(checkpoint: Path) -> None:
    """Make `best` beside a checkpoint a link to it, replaced in one step."""
    link = checkpoint.parent / "best"
    fresh = checkpoint.parent / f"{_STAGING_PREFIX}best"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(checkpoint.name)
    fresh.replace(link)
    _flush_directory(checkpoint.parent)


def rotate(class_directory: Path, *, keep: int, best_step: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one, and stale staging folders."""
    _remove_staging(class_directory)
    for directory in list_checkpoints(class_directory)[keep:]:
        if directory != checkpoint_path(class_directory, best_step):
            # Under another name first, so that a half-removed folder is not taken for a checkpoint.
            directory.replace(directory.with_name(f"{_STAGING_PREFIX}removed-{directory.name}"))
    _remove_staging(class_directory)


def _remove_staging(class_directory: Path) -> None:
    for leftover in class_directory.glob(f"{_STAGING_PREFIX}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def publish_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Write a directory with `write(staging)`, whole or not at all, replacing what was there."""
    with _staged(target) as staging:
        write(staging)


def write_json(path: Path, content: object) -> None:
    """JSON as a person reads it, flushed to the disk, whole or not at all."""
    staging = path.with_name(f"{_STAGING_PREFIX}{path.name}")
    with staging.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """A `.npy` file, flushed to the disk, whole or not at all; its folder is made if need be.

    Raises:
        UserError: when it cannot be written.
    """
    staging = path.with_name(f"{_STAGING_PREFIX}{path.name}")
    try:
        path.parent.mkdir(exist_ok=True)
        with staging.open("wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error.strerror or error}. Make room and start again to "
            "go on."
        ) from error


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends well, and disappears when it does not."""
    folder = target.with_name(f"{_STAGING_PREFIX}{target.name}-{os.getpid()}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        files = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                _flush_file(path)
                files[path.relative_to(folder).as_posix()] = {
                    "bytes": path.stat().st_size,
                    "sha256": _sha256(path),
                }
        write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})
        _flush_directory(folder)
        _replace_directory(folder, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{target} could not be written: {reason}. What was saved before is intact; make room "
            "and start again to go on."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace_directory(folder: Path, target: Path) -> None:
    if target.exists():
        # A directory cannot replace a full one in a single step; the old one goes aside first, and
        # comes back by `_finish_replacing` if this process ends in between.
        aside = target.with_name(f"{_REPLACED_PREFIX}{target.name}")
        shutil.rmtree(aside, ignore_errors=True)
        target.replace(aside)
        folder.replace(target)
        shutil.rmtree(aside)
    else:
        folder.replace(target)
    _flush_directory(target.parent)


def _finish_replacing(class_directory: Path) -> None:
    for aside in class_directory.glob(f"{_REPLACED_PREFIX}*"):
        target = aside.with_name(aside.name.removeprefix(_REPLACED_PREFIX))
        if not target.exists():
            aside.replace(target)


def _check_free_space(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    needed = int(num_bytes * 1.02) + 2**20
    if free < needed:
        raise UserError(
            f"The next checkpoint needs {format_bytes(needed)} in {directory}, and "
            f"{format_bytes(free)} are free. What was saved before is intact; make room and start "
            "again to go on."
        )


def _tensor_bytes(tree: object) -> int:
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, Mapping):
        return sum(_tensor_bytes(value) for value in tree.values())
    if isinstance(tree, list | tuple):
        return sum(_tensor_bytes(value) for value in tree)
    return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_file(path: Path) -> None:
    with path.open("rb+") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    if sys.platform == "win32":
        return  # it has no such call; renames are in its journal
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
