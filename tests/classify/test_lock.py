"""One process at work in a run directory, with real processes that start, hold, are killed."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from accel_gpt2.classify import lock
from accel_gpt2.classify.evaluate import evaluate_run
from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.lock import (
    Owner,
    check_free,
    claim,
    hold,
    is_alive,
    read_owner,
    working_owner,
)
from accel_gpt2.errors import UserError

from .conftest import resolve_tiny

Forked = tuple[int, Connection]


@pytest.fixture
def fork() -> Iterator[Callable[..., Forked]]:
    """Starts processes that hold a run directory until they are ended."""
    context = multiprocessing.get_context("fork")
    processes = []

    def start(work: Callable[..., None], *arguments: Any) -> Forked:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, *arguments))
        process.start()
        processes.append(process)
        assert process.pid is not None
        return process.pid, here

    yield start
    for process in processes:
        process.kill()
        process.join()


def _hold(told: Connection, run: Path, heir_of: int | None = None) -> None:
    """Hold a run directory, say so, and let go when told to; or say why not."""
    try:
        with hold(run, heir_of=heir_of):
            told.send("holds")
            told.recv()
    except UserError as error:
        told.send(str(error))
    told.send("ended")


def _claim(told: Connection, run: Path) -> None:
    with claim(run):
        told.send("claims")
        told.recv()
    told.send("ended")


def _answer(told: Connection) -> str:
    assert told.poll(20), "the process said nothing"
    return str(told.recv())


def _owner(**changes: Any) -> Owner:
    """A record of this very process, or of what is changed in it."""
    values: dict[str, Any] = {
        "pid": os.getpid(),
        "create_time": psutil.Process().create_time(),
        "host": socket.gethostname(),
        "command": "accel-gpt2 train",
        "started_at": "2026-11-23T07:56:16+00:00",
        **changes,
    }
    return Owner(**values)


def _write(run: Path, owner: Owner) -> None:
    run.mkdir(exist_ok=True)
    record = {name: getattr(owner, name) for name in Owner.__slots__}
    (run / "owner.json").write_text(json.dumps(record))


def test_the_second_start_is_refused_with_the_first_ones_name(
    tmp_path: Path, fork: Callable[..., Forked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence: which process on which machine, what its user typed, since when, how to stop
    it."""
    monkeypatch.setattr("sys.argv", ["/opt/bin/accel-gpt2", "train", "--dataset", "my texts.csv"])
    pid, told = fork(_hold, tmp_path / "run")
    assert _answer(told) == "holds"
    host = re.escape(socket.gethostname())
    with (
        pytest.raises(
            UserError,
            match=rf"^Process {pid} on {host} \(`accel-gpt2 train --dataset 'my texts.csv'`, since "
            rf"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d\) is at work in .*run; .*`kill {pid}`",
        ),
        hold(tmp_path / "run"),
    ):
        pass
    owner = working_owner(tmp_path / "run")
    assert owner is not None
    assert owner.pid == pid  # a refused start leaves the owner's record alone
    told.send("let go")
    assert _answer(told) == "ended"
    with hold(tmp_path / "run"):
        assert read_owner(tmp_path / "run") == _owner(
            command="accel-gpt2 train --dataset 'my texts.csv'",
            started_at=getattr(read_owner(tmp_path / "run"), "started_at", ""),
        )
    assert read_owner(tmp_path / "run") is None


def test_of_starts_at_the_same_moment_one_wins(tmp_path: Path, fork: Callable[..., Forked]) -> None:
    """Four processes, twelve times: one holds, three are refused, and none is kept waiting."""
    context = multiprocessing.get_context("fork")
    for number in range(12):
        run = tmp_path / f"run-{number}"
        if number % 2:  # what a killed run has left
            _write(run, _owner(pid=2**22 - 1, create_time=1.0))
        together = context.Barrier(4)

        def start(told: Connection, run: Path = run, together: Any = together) -> None:
            together.wait()
            _hold(told, run)

        started = [fork(start) for _ in range(4)]
        answers = [_answer(told) for _, told in started]
        assert answers.count("holds") == 1, answers
        refused = [answer for answer in answers if answer != "holds"]
        assert all("is at work in" in answer or "holds" in answer for answer in refused), answers
        holder = started[answers.index("holds")]
        owner = read_owner(run)
        assert owner is not None
        assert owner.pid == holder[0]
        holder[1].send("let go")


def test_a_killed_owner_is_taken_over(tmp_path: Path, fork: Callable[..., Forked]) -> None:
    """After kill -9 the next start goes on at once, though the record of the dead one is there."""
    pid, told = fork(_hold, tmp_path / "run")
    assert _answer(told) == "holds"
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    left = read_owner(tmp_path / "run")
    assert left is not None
    assert left.pid == pid
    with hold(tmp_path / "run"):
        assert read_owner(tmp_path / "run") == _owner(
            command=getattr(read_owner(tmp_path / "run"), "command", ""),
            started_at=getattr(read_owner(tmp_path / "run"), "started_at", ""),
        )


def test_a_number_given_to_another_process_is_not_the_owner(tmp_path: Path) -> None:
    """After a restart of the machine the owner's number belongs to somebody else, who is alive."""
    parent = psutil.Process(os.getppid())
    _write(tmp_path / "run", _owner(pid=parent.pid, create_time=parent.create_time() - 86_400))
    assert working_owner(tmp_path / "run") is None
    with hold(tmp_path / "run"):
        pass
    _write(tmp_path / "run", _owner(pid=parent.pid, create_time=parent.create_time()))
    with pytest.raises(UserError, match=rf"Process {parent.pid} on"), hold(tmp_path / "run"):
        pass


def test_what_a_killed_owner_had_started_still_counts(
    tmp_path: Path, fork: Callable[..., Forked]
) -> None:
    """A child that outlives the owner holds the lock on, and may be writing."""

    def parent(told: Connection, run: Path) -> None:
        with hold(run):
            if os.fork() == 0:
                told.send(str(os.getpid()))
                time.sleep(60)
            time.sleep(60)

    pid, told = fork(parent, tmp_path / "run")
    child = int(_answer(told))
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with (
        pytest.raises(UserError, match=r"Another process holds .*run\.lock \(`fuser "),
        hold(tmp_path / "run"),
    ):
        pass
    os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(UserError), hold(tmp_path / "run"):
            break
        assert time.monotonic() < deadline


def test_a_trainer_takes_over_from_the_process_that_started_it(
    tmp_path: Path, fork: Callable[..., Forked]
) -> None:
    """Between `accel-gpt2 train` and its trainer nobody gets in, also when the former is killed."""
    run = tmp_path / "run"
    starter, starter_told = fork(_claim, run)
    assert _answer(starter_told) == "claims"
    _, stranger = fork(_hold, run)
    assert f"Process {starter} on" in _answer(stranger)
    typed = getattr(read_owner(run), "started_at", None)

    trainer, trainer_told = fork(_hold, run, starter)
    assert _answer(trainer_told) == "holds"
    owner = read_owner(run)
    assert owner is not None
    assert (owner.pid, owner.started_at) == (trainer, typed)
    check_free(run, heir_of=trainer)

    starter_told.send("let go")
    assert _answer(starter_told) == "ended"
    assert getattr(read_owner(run), "pid", None) == trainer  # its own record was replaced
    _, late = fork(_hold, run)
    assert f"Process {trainer} on" in _answer(late)


def test_a_claim_between_looking_and_locking_is_seen(
    tmp_path: Path, fork: Callable[..., Forked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim leaves its lock free for the trainer, so who gets that lock has to look again."""
    (tmp_path / "run").mkdir()
    real = lock._lock
    claims: list[int] = []

    def after_a_claim(descriptor: int) -> bool | None:
        if not claims:
            monkeypatch.setattr(lock, "_lock", real)  # the forked process locks as ever
            pid, told = fork(_claim, tmp_path / "run")
            claims.append(pid)
            assert _answer(told) == "claims"
        return real(descriptor)

    monkeypatch.setattr(lock, "_lock", after_a_claim)
    with pytest.raises(UserError, match=r"is at work in") as caught, hold(tmp_path / "run"):
        pass
    assert f"Process {claims[0]} on" in str(caught.value)


def test_holding_twice_is_holding_once(tmp_path: Path, fork: Callable[..., Forked]) -> None:
    """The command line takes the directory before `fit` does; a forked child has not got it."""
    with hold(tmp_path / "run"):
        with hold(tmp_path / "run"):
            pass
        assert getattr(read_owner(tmp_path / "run"), "pid", None) == os.getpid()
        _, told = fork(_hold, tmp_path / "run")
        assert f"Process {os.getpid()} on" in _answer(told)


@pytest.fixture
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, as some network and FUSE mounts are."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("_no_locks")
def test_without_locks_the_record_decides(tmp_path: Path, fork: Callable[..., Forked]) -> None:
    """A live owner is respected, a dead one taken over, and of two starts at once one goes on."""
    run = tmp_path / "run"
    pid, told = fork(_hold, run)
    assert _answer(told) == "holds"
    with pytest.raises(UserError, match=rf"Process {pid} on"), hold(run):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    together = multiprocessing.get_context("fork").Barrier(3)

    def start(told: Connection) -> None:
        together.wait()
        _hold(told, run)

    started = [fork(start) for _ in range(3)]
    assert [_answer(told) for _, told in started].count("holds") == 1


def test_an_owner_on_another_machine_is_gone_when_the_lock_is_free(tmp_path: Path) -> None:
    """A spot machine that was taken away leaves its record on the network disk; its successor goes
    on without anybody's help."""
    _write(tmp_path / "run", _owner(host="taken-away"))
    assert is_alive(_owner(host="taken-away")) is None
    with hold(tmp_path / "run"):
        assert getattr(read_owner(tmp_path / "run"), "host", None) == socket.gethostname()


@pytest.mark.usefixtures("_no_locks")
def test_an_owner_on_another_machine_without_locks_is_for_the_person_to_judge(
    tmp_path: Path,
) -> None:
    """What cannot be told is not guessed: the sentence has the command that says it is over."""
    run = tmp_path / "my run"
    _write(run, _owner(host="elsewhere", pid=7))
    with (
        pytest.raises(
            UserError, match=r"^Process 7 on elsewhere .* type `rm '(.*my run/owner\.json)'`"
        ) as caught,
        hold(run),
    ):
        pass
    command = re.search(r"`rm '(.*)'`", str(caught.value))
    assert command is not None
    Path(command[1]).unlink()
    with hold(run):
        pass


@pytest.mark.parametrize("record", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}', "\udcff"])
def test_a_damaged_record_blocks_nobody(tmp_path: Path, record: str) -> None:
    """owner.json of a full disk, or edited by hand: the lock decides."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "owner.json").write_bytes(record.encode("utf-8", "surrogateescape"))
    assert read_owner(run) is None
    with hold(run):
        assert getattr(read_owner(run), "pid", None) == os.getpid()


def test_numbers_that_no_process_has_are_dead() -> None:
    """A record may hold any number."""
    for pid in (-1, 2**22 - 1, 2**40, 2**70):
        assert is_alive(_owner(pid=pid)) is False


def test_a_directory_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    """The lock is the first thing that is written, so it is where a wrong path shows."""
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"run\.lock could not be written: "),
        hold(tmp_path / "file" / "run"),
    ):
        pass


def test_a_lock_that_stays_taken_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds it without having said so: a refusal after a second, not a start that hangs."""
    monkeypatch.setattr(lock, "_WAIT_SECONDS", 0.2)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "run.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        started = time.monotonic()
        with pytest.raises(UserError, match="Another process holds"), hold(tmp_path / "run"):
            pass
    assert 0.2 <= time.monotonic() - started < 5


def test_training_and_evaluating_keep_out_of_a_run_that_is_worked_in(
    trained_run: Path, texts_file: Path, tmp_path: Path, fork: Callable[..., Forked]
) -> None:
    """`fit` and `evaluate_run` hold the lock themselves, whoever calls them, and write nothing
    when they are refused."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    pid, told = fork(_hold, run)
    assert _answer(told) == "holds"
    before = sorted((path, path.lstat().st_mtime_ns) for path in run.rglob("*"))
    for work in (
        lambda: fit(resolve_tiny(texts_file), run, resume="never", quiet=True),
        lambda: evaluate_run(run, quiet=True),
    ):
        with pytest.raises(UserError, match=rf"Process {pid} on .* is at work in"):
            work()
    assert sorted((path, path.lstat().st_mtime_ns) for path in run.rglob("*")) == before
    told.send("let go")
    assert _answer(told) == "ended"
    fit(resolve_tiny(texts_file), run, quiet=True)
    assert read_owner(run) is None
