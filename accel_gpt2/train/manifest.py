"""Directories with a manifest: written whole or not at all, and verified when they are read.

The manifest lists every file with its size and sha256. It is written last, into a staging folder
that is flushed to the disk and then renamed; so a directory with a name of its own is whole, until
the disk damages it, and `verify` finds that out.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from annotated_types import Ge
from pydantic import StringConstraints, TypeAdapter, ValidationError

from accel_gpt2.durable import (
    STAGING_PREFIX,
    flush_directory,
    flush_tree,
    make_directory,
    os_error_in,
    remove,
    write_failure,
    write_json,
)
from accel_gpt2.errors import UserError

T = TypeVar("T")

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_REPLACED_PREFIX = f"{STAGING_PREFIX}replaced-"


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A line of the manifest."""

    bytes: Annotated[int, Ge(0)]
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Every file of a directory but the manifest itself, by its path within it."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True, "extra": "forbid"}

    format_version: int
    files: dict[str, _File]


_ANY_READER = TypeAdapter(dict[str, Any])
_MANIFEST_READER = TypeAdapter(Manifest)


def publish_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Write a directory with `write(staging)`, whole or not at all, replacing what was there."""
    with staged_directory(target) as staging:
        write(staging)


@contextlib.contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends well, and disappears when it does not."""
    folder = target.with_name(f"{STAGING_PREFIX}{target.name}")
    try:
        remove(folder)  # of a process that was killed here
        make_directory(folder)
        yield folder
        files = {
            file.relative_to(folder).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": _sha256(file),
            }
            for file in flush_tree(folder)
        }
        write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})
        _replace_directory(folder, target)
    except Exception as error:
        failure = os_error_in(error)
        if failure is None:
            raise
        raise write_failure(target, failure) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace_directory(folder: Path, target: Path) -> None:
    if os.path.lexists(target):
        # A directory cannot replace a full one in a single step; the old one goes aside first, and
        # comes back by `finish_replacing` if this process ends in between.
        aside = target.with_name(f"{_REPLACED_PREFIX}{target.name}")
        remove(aside)
        target.replace(aside)
        try:
            folder.replace(target)
        except BaseException:
            aside.replace(target)
            raise
        flush_directory(target.parent)
        remove(aside)
    else:
        folder.replace(target)
    flush_directory(target.parent)


def finish_replacing(parent: Path) -> None:
    """Give back its name to what a process was about to replace when it was killed."""
    for aside in parent.glob(f"{_REPLACED_PREFIX}*"):
        target = aside.with_name(aside.name.removeprefix(_REPLACED_PREFIX))
        if not os.path.lexists(target):
            aside.replace(target)


def verify(directory: Path) -> None:
    """Check every file of a checkpoint or `final/` against its manifest.

    Raises:
        UserError: naming what is wrong.
    """
    for name, entry in read_manifest(directory).files.items():
        _verify_file(directory, name, entry)


def _verify_file(directory: Path, name: str, entry: _File) -> None:
    file = directory / name
    try:
        inside = directory.resolve() in file.resolve().parents
        if not inside:
            raise UserError(f"{directory} is damaged: {name} leads out of it.")
        if not file.is_file():
            raise UserError(f"{directory} is damaged: {name} is missing.")
        num_bytes = file.stat().st_size
        if num_bytes != entry.bytes:
            raise UserError(
                f"{directory} is damaged: {name} has {num_bytes} bytes, {entry.bytes} were written."
            )
        found = _sha256(file)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{directory} is damaged: {name!r} cannot be read: {error}.") from None
    if found != entry.sha256:
        raise UserError(f"{directory} is damaged: the content of {name} has changed.")


def read_manifest(directory: Path) -> Manifest:
    """What a directory holds, by its manifest.

    Raises:
        UserError: when it has none that this version reads.
    """
    path = directory / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise UserError(f"{directory} is not whole: it has no {MANIFEST}.")
    version = read_json(_ANY_READER, path).get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{directory} has format {version}; this version of accel-gpt2 reads {FORMAT_VERSION}."
        )
    return read_json(_MANIFEST_READER, path)


def listed_file(directory: Path, name: str) -> Path:
    """The path of a file that the manifest lists: nothing else has been verified."""
    if name not in read_manifest(directory).files:
        raise UserError(f"{directory} is not a checkpoint: it has no {name}.")
    return directory / name


def is_whole(directory: Path) -> bool:
    """Whether `verify` passes."""
    try:
        verify(directory)
    except UserError:
        return False
    return True


def read_json(reader: TypeAdapter[T], path: Path) -> T:
    """Read a JSON file strictly, in the form that the reader takes.

    Raises:
        UserError: saying where the file has another form.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} cannot be read: it is not a file.")
    try:
        return reader.validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValidationError as error:
        raise UserError(f"{path} cannot be read: {first_problem(error)}.") from None


def first_problem(error: ValidationError) -> str:
    """Where the first of pydantic's complaints is, and what it is."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
