"""Copy a run directory to a bucket and back: `python -m accel_gpt2.cloud.keep SOURCE TARGET`.

Mounted buckets have no links, rename by copying, and may show a file before it is whole. So only
what has changed is copied, a checkpoint's manifest after the files that it vouches for, and nothing
is deleted before everything new is there: what a dying machine leaves is always a run to go on
from.
"""

import argparse
import contextlib
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from accel_gpt2.classify.lock import LOCK_FILE, OWNER_FILE
from accel_gpt2.classify.spending import SPENT, merged_ledgers, read_ledger, write_ledger
from accel_gpt2.durable import STAGING_PREFIX
from accel_gpt2.errors import UserError
from accel_gpt2.train.manifest import MANIFEST

# Who is at work in the directory is true on one machine only.
_LEFT_OUT = frozenset({LOCK_FILE, OWNER_FILE})


def in_checkpoint(path: Path) -> bool:
    """Whether a path within a run is a checkpoint or in one.

    >>> in_checkpoint(Path("class-0-neg/checkpoint-50/model.safetensors"))
    True
    >>> in_checkpoint(Path("class-0-neg/final/model.safetensors"))
    False
    """
    return any(part.startswith("checkpoint-") for part in path.parts)


def copy_run(source: Path, target: Path, *, leave_out: Callable[[Path], bool] | None = None) -> int:
    """Make `target` hold the files of `source`; the number of files that were copied.

    A file that is there with the same size and no older is left alone. Links are left out: `best`
    is made again where the training goes on. Ledgers are put together. A source that does not exist
    is an empty run.

    Args:
        leave_out: says of a path within the run whether it stays where it is; nothing is deleted
            then.

    Raises:
        OSError: when a file cannot be read or written; one that vanishes is passed over.
        UserError: when a ledger is damaged.
    """
    files = {path.relative_to(source): path for path in source.rglob("*") if _is_kept(path, source)}
    if leave_out is not None:
        files = {name: path for name, path in files.items() if not leave_out(name)}
    copied = 0
    for name in sorted(files, key=lambda name: (name.name == MANIFEST, name)):
        if name == Path(SPENT):
            copied += _copy_ledger(source, target)
        else:
            copied += _copy(files[name], target / name)
    if files and leave_out is None:
        for path in sorted(target.rglob("*"), reverse=True):
            name = path.relative_to(target)
            if path.is_dir():
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
            elif name not in files and name.name not in _LEFT_OUT | {SPENT}:
                path.unlink(missing_ok=True)
    return copied


def _is_kept(path: Path, source: Path) -> bool:
    name = path.relative_to(source)
    staged = any(part.startswith(STAGING_PREFIX) for part in name.parts)
    linked = any((source / parent).is_symlink() for parent in (name, *name.parents[:-1]))
    return not staged and not linked and name.name not in _LEFT_OUT and path.is_file()


def _copy_ledger(source: Path, target: Path) -> bool:
    """No machine is forgotten, whichever of the two runs it was noted in."""
    theirs, ours = read_ledger(source), read_ledger(target)
    both = merged_ledgers(ours, theirs)
    if set(both) == set(ours):
        return False
    if set(both) == set(theirs):
        return _copy(source / SPENT, target / SPENT)
    write_ledger(target, both)
    return True


def _copy(source: Path, target: Path) -> bool:
    try:
        here = source.stat()
        if target.exists():
            there = target.stat()
            if there.st_size == here.st_size and there.st_mtime >= here.st_mtime:
                return False
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except FileNotFoundError:
        if source.exists():
            raise
        return False  # a checkpoint that was rotated away, which takes its manifest with it
    return True


def main() -> int:
    """Copy once; with --every, again after so many seconds until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m accel_gpt2.cloud.keep")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--every", type=float, metavar="SECONDS")
    arguments = parser.parse_args()
    ended = threading.Event()
    if arguments.every is not None:
        signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
        ended.wait(arguments.every)
    while not ended.is_set():
        try:
            copy_run(arguments.source, arguments.target)
        except (OSError, UserError) as error:
            sys.stderr.write(f"{arguments.source} is not copied: {error}\n")
            if arguments.every is None:
                return 1
        if arguments.every is None:
            break
        ended.wait(arguments.every)
    return 0


if __name__ == "__main__":
    sys.exit(main())
