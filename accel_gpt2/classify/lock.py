"""One process at work in a run directory: who it is, and a lock that dies with it.

The lock is the operating system's, on an empty file that stays. It goes when its holder ends,
however that happens, so a killed owner or a restarted machine stands in nobody's way, and of two
starts at the same moment one gets it. `owner.json` beside it says who the holder is. Where the file
system has no locks, that record decides alone, by whether its process still lives.

A run on several GPUs is one owner: its first process holds the lock for all.
"""

import contextlib
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from accel_gpt2.durable import STAGING_PREFIX, make_directory, write_failure, writing
from accel_gpt2.errors import UserError

LOCK_FILE = "run.lock"
OWNER_FILE = "owner.json"

# A start that is being refused holds the lock for a moment, to look.
_WAIT_SECONDS = 1.0
_POLL_SECONDS = 0.05
# Without the operating system's lock: how long another start may take from looking to writing.
_SETTLE_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who is at work in a run directory."""

    pid: int
    create_time: float  # of the process, seconds since 1970: numbers are given out again
    host: str
    command: str
    started_at: str  # ISO 8601, local time with its offset


def read_owner(run_directory: Path) -> Owner | None:
    """Whoever says to be at work in a run directory, dead or alive; None when nobody does."""
    try:
        record = json.loads((run_directory / OWNER_FILE).read_text(encoding="utf-8"))
        return Owner(
            pid=int(record["pid"]),
            create_time=float(record["create_time"]),
            host=str(record["host"]),
            command=str(record["command"]),
            started_at=str(record["started_at"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_alive(owner: Owner) -> bool | None:
    """Whether an owner's process still runs; None where this machine cannot tell."""
    if owner.host != socket.gethostname():
        return None
    import psutil

    try:
        process = psutil.Process(owner.pid)
        # A number that was given to another process since then has another time of birth.
        same = abs(process.create_time() - owner.create_time) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OverflowError):
        return False


def working_owner(run_directory: Path) -> Owner | None:
    """The live process of this machine, other than this one, that works in a run directory."""
    owner = read_owner(run_directory)
    if owner is None or owner.pid == os.getpid() or not is_alive(owner):
        return None
    return owner


def check_free(run_directory: Path, *, heir_of: int | None = None) -> None:
    """Refuse a run directory in which another process is at work.

    Args:
        heir_of: the process that started this one, whose claim does not count.

    Raises:
        UserError: naming that process.
    """
    owner = working_owner(run_directory)
    if owner is not None and owner.pid != heir_of:
        raise _taken(run_directory, owner)


@contextlib.contextmanager
def claim(run_directory: Path) -> Iterator[None]:
    """Keep others out while this process prepares a run directory and runs a trainer in it.

    The trainer takes over by `hold(..., heir_of=<this process>)`; its lock outlives this process.

    Raises:
        UserError: when another process is at work there, or nothing can be written.
    """
    with _locked(run_directory, heir_of=None) as (owner, _):
        _write_record(run_directory, owner)
    try:
        yield
    finally:
        _remove_own_record(run_directory)


@contextlib.contextmanager
def hold(run_directory: Path, *, heir_of: int | None = None) -> Iterator[None]:
    """Be the one process at work in a run directory, which is made if need be.

    Within a process that holds it already this changes nothing.

    Args:
        heir_of: the process that started this one, whose `claim` this one takes over.

    Raises:
        UserError: when another process is at work there, or nothing can be written.
    """
    key = (os.getpid(), run_directory.resolve())  # a forked process has not got its parent's lock
    if key in _held:
        yield
        return
    with _locked(run_directory, heir_of=heir_of) as (owner, descriptor):
        _write_record(run_directory, owner)
        _held[key] = descriptor
        try:
            yield
        finally:
            del _held[key]
            _remove_own_record(run_directory)


_held: dict[tuple[int, Path], int] = {}


def held_descriptor(run_directory: Path) -> int:
    """The open file of the lock that this process holds.

    Whoever inherits it has a part in the lock, which goes when the last of them ends.
    """
    return _held[os.getpid(), run_directory.resolve()]


@contextlib.contextmanager
def _locked(run_directory: Path, *, heir_of: int | None) -> Iterator[tuple[Owner, int]]:
    """The lock, for the block: the record that its holder may write, and the locked file."""
    check_free(run_directory, heir_of=heir_of)
    path = run_directory / LOCK_FILE
    try:
        make_directory(run_directory)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_failure(path, error) from error
    try:
        deadline = time.monotonic() + _WAIT_SECONDS
        while (locked := _lock(descriptor)) is False and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            check_free(run_directory, heir_of=heir_of)
        owner = read_owner(run_directory)
        if locked is False:
            raise _taken(run_directory, owner)
        check_free(run_directory, heir_of=heir_of)  # again: the first time was without the lock
        if locked is None and owner is not None and is_alive(owner) is None:
            raise _unknown(run_directory, owner)
        mine = _this_process()
        if owner is not None and owner.pid == heir_of:  # one run, started by what its user typed
            mine = _this_process(command=owner.command, started_at=owner.started_at)
        if locked is None:
            _settle(run_directory, mine)
        yield mine, descriptor
    finally:
        os.close(descriptor)  # and with it the lock


def _lock(descriptor: int) -> bool | None:
    """Take the operating system's lock: False when another has it, None when there is none."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP: some network and FUSE file systems
        return None
    return True


def _settle(run_directory: Path, mine: Owner) -> None:
    """Without a lock: of several starts at the same moment, the one that wrote last goes on."""
    _write_record(run_directory, mine)
    time.sleep(_SETTLE_SECONDS)
    owner = read_owner(run_directory)
    if owner != mine:
        raise _taken(run_directory, owner)


def _this_process(*, command: str | None = None, started_at: str | None = None) -> Owner:
    import psutil

    typed = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return Owner(
        pid=os.getpid(),
        create_time=psutil.Process().create_time(),
        host=socket.gethostname(),
        command=typed if command is None else command,
        started_at=started_at or datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def _write_record(run_directory: Path, owner: Owner) -> None:
    path = run_directory / OWNER_FILE
    staging = path.with_name(f"{STAGING_PREFIX}{OWNER_FILE}-{os.getpid()}")
    with writing(path):
        staging.write_text(json.dumps(asdict(owner)) + "\n", encoding="utf-8")
        staging.replace(path)


def _remove_own_record(run_directory: Path) -> None:
    owner = read_owner(run_directory)
    if owner is not None and (owner.host, owner.pid) == (socket.gethostname(), os.getpid()):
        with contextlib.suppress(OSError):  # a record of a dead process is in nobody's way
            (run_directory / OWNER_FILE).unlink(missing_ok=True)


def _taken(run_directory: Path, owner: Owner | None) -> UserError:
    lock = run_directory / LOCK_FILE
    if owner is None or is_alive(owner) is False:
        return UserError(
            f"Another process holds {lock} (`fuser {shlex.quote(str(lock))}` names it); wait for "
            "it, stop it, or choose another run directory."
        )
    here = owner.host == socket.gethostname()
    stop = f"`kill {owner.pid}`" if here else f"`kill {owner.pid}` there"
    return UserError(
        f"{_described(owner)} is at work in {run_directory}; wait for it, stop it with {stop} (a "
        "training saves first), or choose another run directory."
    )


def _unknown(run_directory: Path, owner: Owner) -> UserError:
    record = shlex.quote(str(run_directory / OWNER_FILE))
    return UserError(
        f"{_described(owner)} was at work in {run_directory}, and from here nobody can tell "
        f"whether it still is; if it is not, type `rm {record}` and start again."
    )


def _described(owner: Owner) -> str:
    since = owner.started_at.replace("T", " ")
    return f"Process {owner.pid} on {owner.host} (`{owner.command[:200]}`, since {since})"
