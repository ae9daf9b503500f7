"""Files that are whole or not there, also after a kill, a power loss or on a full disk.

Content is on the disk once its file is flushed, and a name once the folder that holds it is. So
everything here is written under a staging name, flushed, renamed in one step, and the folder is
flushed after that. What a crash leaves is a staging name, which nothing reads.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from accel_gpt2.errors import UserError

STAGING_PREFIX = ".staging-"

_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within the quota",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "get the right to write there",
    errno.EPERM: "get the right to write there",
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`)",
}


def write_failure(path: Path, error: OSError) -> UserError:
    """What to tell a person when `path` could not be written.

    >>> print(write_failure(Path("runs/a/log.jsonl"), OSError(28, "No space left on device")))
    runs/a/log.jsonl could not be written: No space left on device. What was saved before is \
intact; make room and start again to go on.
    """
    advice = _ADVICE.get(error.errno or 0, "check the disk and its connection (`dmesg` tells)")
    return UserError(
        f"{path} could not be written: {error.strerror or error}. What was saved before is intact; "
        f"{advice} and start again to go on."
    )


def os_error_in(error: BaseException) -> OSError | None:
    """The operating system's error inside a library's own, or None.

    torch raises a RuntimeError while it handles an OSError; safetensors and tokenizers, written in
    Rust, have only its number in their text.

    >>> os_error_in(ValueError("I/O error: No space left on device (os error 28)")).errno
    28
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError):
            return found
        number = re.search(r"\(os error (\d+)\)", str(found))
        if number is not None:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        found = found.__cause__ or found.__context__
    return None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write within the block into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise write_failure(path, error) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; its folder must exist.

    Raises:
        UserError: when it cannot be written; what was there before stays.
    """
    staging = path.with_name(f"{STAGING_PREFIX}{path.name}")
    with writing(path):
        try:
            with staging.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            staging.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                staging.unlink(missing_ok=True)
            raise
        flush_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: object) -> None:
    """`write_bytes` of JSON as a person reads it."""
    write_text(path, json_text(content))


def json_text(content: object) -> str:
    """JSON as a person reads it; infinities are written as Python reads them."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def make_directory(path: Path) -> None:
    """Make a folder and those above it; each name is flushed in its parent.

    Raises:
        OSError: when it cannot be made, or something else has its name.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    flush_directory(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_tree(folder: Path) -> list[Path]:
    """Flush all files of a folder and all folders in it, itself last; the files, sorted.

    Each file gets the mode that the user's umask gives: safetensors makes its files 0600.
    """
    mode = _mode_of_a_new_file(folder)
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    for file in files:
        if stat.S_IMODE(file.stat().st_mode) != mode:
            file.chmod(mode)
        with file.open("rb+") as opened:  # Windows flushes only what is open for writing
            os.fsync(opened.fileno())
    for directory in reversed([path for path in paths if path.is_dir()]):
        flush_directory(directory)
    flush_directory(folder)
    return files


def _mode_of_a_new_file(folder: Path) -> int:
    # Asking for the umask means setting it, for all threads.
    probe = folder / f"{STAGING_PREFIX}mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def flush_directory(path: Path) -> None:
    """Put the names that a folder holds on the disk."""
    if sys.platform == "win32":
        return  # it has no such call; renames are in its journal
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder, and do without.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)
