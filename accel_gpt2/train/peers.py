"""The processes of one run look after one another: when one fails, the others learn why and leave.

Without this, a process that dies leaves the others in a collective: with gloo they end with a
`Connection closed by peer` that hides the cause, with NCCL they wait for the time-out.

A process that fails says why, puts a notice into the store through which the processes met, and
leaves. A thread of every other one looks for the notice, and for processes that are gone without
having left any. It ends its process, unless the main thread notices first and ends by itself.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from accel_gpt2.errors import ExitCode, StoppedEarly, UserError
from accel_gpt2.failures import ending, is_expected, mark_as_told
from accel_gpt2.terminal import printable

POLL_SECONDS = 0.5
# For the main thread of a survivor to leave by itself: enough to finish a checkpoint, less than the
# 30 seconds after which torchrun kills.
GRACE_SECONDS = 20.0
# For all processes to be there, at the start; they started together.
_MEETING_SECONDS = 30.0
# For the others to take notice, before a process that keeps their store leaves.
_NOTICED_SECONDS = 5.0
# For the end of a process to be seen after its connections have closed.
_EVIDENCE_SECONDS = 10.0
# Of everything that processes wait for in one another. A death is noticed long before; this ends a
# hang, and must be longer than the slowest save.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)

_LOST_CONNECTION = re.compile(
    r"gloo|nccl|Connection (was likely )?(closed|reset|refused)|Broken pipe|Socket ?Timeout",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one process of the run ended."""

    rank: int
    exit_code: int
    sentence: str
    kind: Literal["stopped", "expected", "unexpected", "killed"]  # unexpected: with a traceback


class PeerFailedError(UserError):
    """Another process of the run failed, and this one cannot go on without it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = ExitCode(exit_code) if exit_code in set(ExitCode) else ExitCode.FAILED


def consequence(failure: Failure) -> "PeerFailedError | StoppedEarly":
    """What the failure of one process is to the others.

    >>> print(consequence(Failure(rank=1, exit_code=1, sentence="No such file.", kind="expected")))
    Process 1: No such file.
    """
    who = f"Process {failure.rank}"
    match failure.kind:
        case "stopped":
            return StoppedEarly(f"{who}: {failure.sentence}", ExitCode(failure.exit_code))
        case "expected":
            text = f"{who}: {failure.sentence}"
        case "unexpected":
            text = (
                f"{who} of the run failed ({failure.sentence}); its traceback is above. Start "
                "again to go on from the newest whole checkpoint."
            )
        case "killed":
            text = (
                f"{who} of the run ended without a word, as when memory runs out (`dmesg` tells) "
                "or someone kills it. Start again to go on from the newest whole checkpoint, with "
                "a smaller --set micro_batch_tokens=... if it was memory."
            )
    return PeerFailedError(text, failure.exit_code)


def _say(error: PeerFailedError | StoppedEarly) -> None:
    if _rank() == 0:
        sys.stderr.write(printable(f"{error}\n"))
        sys.stderr.flush()


LastWords = Callable[[PeerFailedError | StoppedEarly], None]

_watch: "_Watch | None" = None
_numbers = itertools.count()  # of the watches of this process; all processes count alike


@contextlib.contextmanager
def watching_peers(last_words: LastWords = _say) -> Iterator[None]:
    """Within the block, a failure of one of the launched processes ends all of them, soon.

    Entered by all of them together; alone, and within another such block, it does nothing.

    Args:
        last_words: called before this process is ended from outside its main thread, which another
            process's failure has left waiting for ever.

    Raises:
        PeerFailedError: in place of whatever another process's failure has brought about here;
            StoppedEarly when the other one was stopped on purpose.
    """
    global _watch
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _watch is not None:
        yield
        return
    _watch = _Watch(last_words)
    try:
        _watch.meet()
        yield
    except BaseException as error:
        with _signals_ignored():
            failure = _watch.leave(error)
        if failure is not None:
            raise _told_where_nobody_else_tells(consequence(failure), failure) from error
        raise
    else:
        _watch.finish()
    finally:
        _watch = None


def _told_where_nobody_else_tells(
    error: PeerFailedError | StoppedEarly, failure: Failure
) -> PeerFailedError | StoppedEarly:
    """The first process talks for all, but not about its own sudden death."""
    if failure.kind == "killed" and failure.rank == 0 and _rank() == 1:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        mark_as_told(error)
    return error


class _Watch:
    def __init__(self, last_words: LastWords) -> None:
        self._rank = _rank()
        self._others = [r for r in range(int(os.environ["WORLD_SIZE"])) if r != self._rank]
        self._last_words = last_words
        self._prefix = f"accel-gpt2/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._prefix += f"/{next(_numbers)}"
        self._store: Any = None
        self._processes: dict[int, _Process] = {}
        self._ended = threading.Event()
        self._failure: Failure | None = None
        # One thread at a time looks, so that both see the same.
        self._looking = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def meet(self) -> None:
        """Wait for all to be there; from then on, the death of any is noticed by all others."""

        def met() -> bool:
            everybody = len(self._processes) == len(self._others)
            return everybody or self._failure is not None or not self._thread.is_alive()

        _within(_MEETING_SECONDS, met)
        if self._failure is not None:
            raise consequence(self._failure)

    def _run(self) -> None:
        store = _connect(self._prefix)
        if store is None:
            return
        store.set(f"process/{self._rank}", json.dumps(asdict(_this_process())))
        self._store = store
        while not self._ended.wait(self._pause_seconds()):
            failure = self._look()
            if failure is not None:
                break
        else:
            return
        if self._ended.wait(GRACE_SECONDS):
            return
        error = _told_where_nobody_else_tells(consequence(failure), failure)
        try:
            self._last_words(error)
        finally:
            sys.stderr.flush()
            os._exit(error.exit_code)

    def _pause_seconds(self) -> float:
        return POLL_SECONDS if len(self._processes) == len(self._others) else 0.05

    def _look(self) -> Failure | None:
        """The failure of another process, once there is one; what is known needs no store."""
        with self._looking:
            if self._failure is None and self._store is not None:
                # First, because asking a store whose process is gone ends in pages of warnings.
                gone = [rank for rank, process in self._processes.items() if process.is_gone()]
                try:
                    self._failure = self._ask(gone)
                except RuntimeError:  # the store went with its process, or with the launcher
                    self._store = None
                    if 0 in self._others:
                        gone.append(0)
                    gone = [rank for rank in gone if self._is_gone_soon(rank)]
                    if gone:
                        self._failure = _killed(gone[0])
            return self._failure

    def _ask(self, gone: list[int]) -> Failure | None:
        store = self._store
        if 0 in gone and not _kept_by_launcher():
            raise RuntimeError("the process that keeps the store is gone")
        if store.check(["failure"]):
            failure = Failure(**json.loads(store.get("failure")))
            store.set(f"noticed/{self._rank}", "")
            return None if failure.rank == self._rank else failure
        for rank in gone:
            if not store.check([f"done/{rank}"]):
                failure = _killed(rank)
                store.compare_set("failure", "", json.dumps(asdict(failure)))
                return failure
        for rank in self._others:
            if rank not in self._processes and store.check([f"process/{rank}"]):
                self._processes[rank] = _Process(**json.loads(store.get(f"process/{rank}")))
        return None

    def _is_gone_soon(self, rank: int) -> bool:
        """Whether a process ends in these seconds: its connections close before it is gone."""
        process = self._processes.get(rank)
        return process is not None and _within(_EVIDENCE_SECONDS, process.is_gone)

    def finish(self) -> None:
        """This process has done its part, and its end is nobody's failure."""
        self._ended.set()
        with contextlib.suppress(RuntimeError), self._looking:
            if self._store is not None and self._failure is None:
                self._store.set(f"done/{self._rank}", "")
                self._store.set(f"noticed/{self._rank}", "")

    def leave(self, error: BaseException) -> Failure | None:
        """Tell the others why this process fails; or return another one's failure, if that is why.

        What the others do not say is printed here, before they say anything.
        """
        try:
            mine = _failure_of(error, self._rank)
            # Met by all in a collective: the first process's failure, or a stop agreed upon.
            if isinstance(error, PeerFailedError) or (mine.kind == "stopped" and _in_a_group()):
                self.finish()
                return None
            lost = _is_lost_connection(error)
            other = self._look()
            if other is None and lost:
                _within(_EVIDENCE_SECONDS, lambda: self._look() is not None)
                other = self._failure
            if other is not None and (lost or (mine.kind == "stopped" and not _same(mine, other))):
                return other
            self._tell(error, mine, other)
            return None
        finally:
            self._ended.set()

    def _tell(self, error: BaseException, mine: Failure, other: Failure | None) -> None:
        if mine.kind == "unexpected":
            _print_traceback(error, self._rank)
            mark_as_told(error)
        if other is None:
            _note_for_torchrun(mine)
        told = set() if other is None else {other.rank}
        if _within(_NOTICED_SECONDS, lambda: self._store is not None):
            with contextlib.suppress(RuntimeError):
                self._publish(mine, told)
        # The first process talks for all, also about what has happened to another one.
        if mine.kind == "expected" and self._rank != 0:
            if 0 not in told:
                sys.stderr.write(printable(f"Process {self._rank}: {mine.sentence}\n"))
            mark_as_told(error)
        sys.stderr.flush()

    def _publish(self, mine: Failure, told: set[int]) -> None:
        """Leave a notice, unless there is one; wait a little for the others to be `told`."""
        store = self._store
        store.compare_set("failure", "", json.dumps(asdict(mine)))
        store.set(f"noticed/{self._rank}", "")

        def all_told() -> bool:
            told.update(rank for rank in self._others if store.check([f"noticed/{rank}"]))
            gone = {rank for rank, process in self._processes.items() if process.is_gone()}
            return told | gone >= set(self._others)

        _within(_NOTICED_SECONDS, all_told)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Process:
    host: str
    pid: int
    create_time: float

    def is_gone(self) -> bool:
        """Whether it has ended; a process of another machine is never known to have."""
        import psutil

        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.create_time) < 1.0
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


def _this_process() -> _Process:
    import psutil

    created = psutil.Process().create_time()
    return _Process(host=socket.gethostname(), pid=os.getpid(), create_time=created)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _kept_by_launcher() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(prefix: str) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT, where torch's own process group will meet as well.

    torchrun keeps it; for processes started by hand the first one does, and torch shares it.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            None,
            _rank() == 0 and not _kept_by_launcher(),
            COLLECTIVE_TIMEOUT,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (KeyError, ValueError, RuntimeError):
        return None  # the process group will not come about either, and says why
    return PrefixStore(prefix, store)


def _failure_of(error: BaseException, rank: int) -> Failure:
    code, sentence = ending(error)
    kind: Literal["stopped", "expected", "unexpected"] = "unexpected"
    if isinstance(error, StoppedEarly | KeyboardInterrupt):
        kind = "stopped"
    elif isinstance(error, SystemExit):  # in the middle of the work, by some library
        code, sentence = ExitCode.FAILED, f"SystemExit: {error.code}"
    elif is_expected(error):
        kind = "expected"
    return Failure(rank=rank, exit_code=int(code), sentence=sentence, kind=kind)


def _in_a_group() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _same(one: Failure, other: Failure) -> bool:
    return (one.kind, one.exit_code) == (other.kind, other.exit_code)


def _killed(rank: int) -> Failure:
    return Failure(rank=rank, exit_code=ExitCode.FAILED, sentence="", kind="killed")


def _is_lost_connection(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or is_expected(error):
        return False
    import torch

    return isinstance(error, torch.distributed.DistError) or bool(
        _LOST_CONNECTION.search(str(error))
    )


def _print_traceback(error: BaseException, rank: int) -> None:
    text = "".join(traceback.format_exception(error))
    # In one piece, so that the lines of two processes do not mix.
    sys.stderr.write(printable(f"Process {rank} of the run failed:\n{text}"))
    sys.stderr.flush()


def _note_for_torchrun(failure: Failure) -> None:
    """Have torchrun's own summary, which comes after all that we print, quote the sentence."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"timestamp": str(int(time.time()))}
    note = {"message": {"message": failure.sentence, "extraInfo": extra}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps(note), encoding="utf-8")


def _within(seconds: float, happens: Callable[[], bool]) -> bool:
    """Whether something comes true in this time."""
    deadline = time.monotonic() + seconds
    while not happens():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """A launcher that has seen one process fail sends the others a signal; they are leaving."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
