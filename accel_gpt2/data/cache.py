"""Files that can be made again: found by what they were made from, checked whenever they are read.

A cached file is called `<key>.<digest><suffix>`. The key says what it was made from, the digest
what it holds, so one rename publishes a file together with its own check: a reader never sees half
a file, damage is noticed, and processes that build the same file at once merely do it twice.
"""

import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accel_gpt2.errors import UserError

CACHE_VARIABLE = "ACCEL_GPT2_CACHE"

# A staging file that is older was left by a process that was killed.
_ABANDONED_SECONDS = 24 * 3600


def cache_directory() -> Path:
    """`ACCEL_GPT2_CACHE`, or `accel-gpt2` in the user's own cache folder; it need not exist."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(user_cache).expanduser() / "accel-gpt2"


def content_key(*parts: object) -> str:
    """A name for what something is made from: equal parts, equal key, on every machine.

    >>> content_key("tokens", 1, 256) == content_key("tokens", 1, 256) != content_key("tokens", 2)
    True
    """
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def find_cached(kind: str, key: str, suffix: str) -> Path | None:
    """The intact file of this key, None where there is none."""
    return _intact_file(cache_directory() / kind, key, suffix)


def cached_file(kind: str, key: str, suffix: str, build: Callable[[Path], None]) -> Path:
    """The intact file of this key; `build` writes it to the path it is given where there is none.

    Raises:
        UserError: when the cache folder cannot be written or is full.
    """
    if (found := find_cached(kind, key, suffix)) is not None:
        return found
    folder = cache_directory() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        _remove_abandoned(folder)
        with _staging_file(folder, key) as staged:
            build(staged)
            path = folder / f"{key}.{_file_digest(staged)}{suffix}"
            _flush_to_disk(staged)
            os.replace(staged, path)
    except OSError as error:
        # What `build` reads has its own errors; these are the folder's.
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk of the cache folder {folder} is full; "
                f"free some space or name another folder with {CACHE_VARIABLE}."
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise _unwritable(folder, error) from None
        raise
    return path


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"The cache folder {folder} cannot be written ({error.strerror}); "
        f"name another folder with {CACHE_VARIABLE}."
    )


def _intact_file(folder: Path, key: str, suffix: str) -> Path | None:
    for path in sorted(folder.glob(f"{key}.*{suffix}")):
        try:
            if path.name == f"{key}.{_file_digest(path)}{suffix}":
                return path
            path.unlink()
        except OSError:  # another process has just removed it, or it cannot be read
            continue
    return None


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


@contextmanager
def _staging_file(folder: Path, key: str) -> Iterator[Path]:
    # Not mkstemp's file, which is its owner's alone: the modes in the cache follow the umask.
    staged = folder / f".{key}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    staged.touch(exist_ok=False)
    try:
        yield staged
    finally:
        staged.unlink(missing_ok=True)  # after the rename there is nothing left to remove


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(".*.partial"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
        except OSError:
            continue
