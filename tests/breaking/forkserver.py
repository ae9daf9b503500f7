"""Starts training processes in tenths of a second: what is slow to import is imported once, here.

Reads requests from stdin, writes events to stdout, one JSON document a line. A request forks the
processes of one start, which run `fit`:

    {"id": 1, "recipe": "...yaml", "run": "...", "output": "...", "world_size": 2, "port": 20000,
     "environment": {}, "holds": [{"rank": 0, "phase": "saving", "number": 7}]}

A hold stops its process (SIGSTOP) when that happens for the `number`-th time in it, so that whoever
asked can kill or signal at this very moment. Phases are told apart by what a process opens, renames
and removes, and by calls of a few public methods of the package.

Events: `forked` (a process is there), `listening` (from here on the training answers signals),
`met` (its process group is there), `held`, `stopped` (it stands still now), `phases` (how often
each was entered, at the end), `ended` (with its exit code, negative for a signal).
"""

import ctypes
import faulthandler
import gc
import json
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import accelerate  # noqa: F401 -- what `fit` would import in every process
import peft  # noqa: F401
import torch
import transformers.models.gpt2.modeling_gpt2  # noqa: F401

from accel_gpt2.classify.fit import fit
from accel_gpt2.cli.errors import outcome
from accel_gpt2.data.tokenizer import TextTokenizer
from accel_gpt2.recipe.layers import read_layer
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.stopping import StopRequest

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Our stdout, which the processes replace by a file. Lines are shorter than PIPE_BUF: none mix.
_EVENTS = os.dup(1)

# What is written, renamed or removed under these names of a run directory belongs to the phase; the
# first that fits.
_STAGED = (
    (re.compile(r"class-.*/\.staging-(replaced-)?final"), "exporting"),
    (re.compile(r"class-.*/\.staging-removed-"), "rotating"),
    (re.compile(r"class-.*/(\.staging-|best)"), "saving"),
    (re.compile(r"\.staging-calibration"), "calibrating"),
    (re.compile(r"\.staging-"), "recording"),  # the plan, the environment, the time spent
)
_PUBLISHED = re.compile(r"class-.*/\.staging-checkpoint-\d+")  # what a save renames last
_FILE_EVENTS = {
    *("open", "os.rename", "os.symlink", "os.mkdir"),
    *("os.remove", "os.rmdir", "shutil.rmtree"),
}


def main() -> None:
    """Answer requests until stdin ends; then nothing that was started is left."""
    gc.collect()
    gc.freeze()  # what the imports made is no garbage, and pages of it stay shared
    children: set[int] = set()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for whoever asks
    _tell({"event": "ready", "threads": len(os.listdir("/proc/self/task"))})
    try:
        _serve(children, wake_read)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def _serve(children: set[int], wake: int) -> None:
    import select

    buffer = b""
    while True:
        readable = select.select([0, wake], [], [])[0]
        if wake in readable:
            os.read(wake, 4096)
            _reap(children)
        if 0 in readable:
            read = os.read(0, 65536)
            if not read:
                return
            *lines, buffer = (buffer + read).split(b"\n")
            for line in lines:
                request = json.loads(line)
                for rank in range(request["world_size"]):
                    pid = os.fork()
                    if pid == 0:
                        _work(request, rank)
                    children.add(pid)
                    _tell({"event": "forked", "id": request["id"], "rank": rank, "pid": pid})


def _reap(children: set[int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        if pid == 0:
            return
        if os.WIFSTOPPED(status):
            _tell({"event": "stopped", "pid": pid})
        else:
            children.discard(pid)
            _tell({"event": "ended", "pid": pid, "code": os.waitstatus_to_exitcode(status)})


def _tell(event: dict[str, Any]) -> None:
    os.write(_EVENTS, (json.dumps(event) + "\n").encode())


def _work(request: dict[str, Any], rank: int) -> None:
    """One training process, from just after the fork to its end; never returns."""
    code = 1
    try:
        code = _train(request, rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's destructor now and then never returns


def _train(request: dict[str, Any], rank: int) -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    output = os.open(f"{request['output']}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for there, here in ((null, 0), (output, 1), (output, 2)):
        os.dup2(there, here)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in _SIGNALS:  # before `fit` listens and after it has ended, a signal means nothing
        signal.signal(number, _ignore)
    faulthandler.dump_traceback_later(120, exit=False)  # a hang says where
    os.environ.update(request["environment"])
    if request["world_size"] > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(request["world_size"]),
            LOCAL_WORLD_SIZE=str(request["world_size"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(request["port"]),
        )
    torch.set_num_threads(1)
    sys.argv = ["breaking"]
    run = Path(request["run"])
    holds = {(hold["phase"], hold["number"]) for hold in request["holds"] if hold["rank"] == rank}
    phases = _watch(run, holds)

    error: BaseException | None = None
    try:
        fit(resolve([read_layer(Path(request["recipe"]))]), run, quiet=True)
    except BaseException as raised:
        error = raised
    code, text = outcome(error)
    sys.stderr.write(f"exit {code}: {text}\n")
    if code == 1 and error is not None:
        traceback.print_exception(error)
    _tell({"event": "phases", "pid": os.getpid(), "phases": dict(phases)})
    if torch.distributed.is_initialized():  # as the package leaves: no barrier, no destructor
        torch.distributed.destroy_process_group()
    return code


def _ignore(number: int, frame: FrameType | None) -> None:
    sys.stderr.write(f"{signal.Signals(number).name} outside of the training\n")


def _watch(run: Path, holds: set[tuple[str, int]]) -> "Counter[str]":
    """Count the phases of this process from here on, and hold it where that was asked for."""
    phases: Counter[str] = Counter()
    prefix = str(run) + "/"

    def enter(phase: str) -> None:
        phases[phase] += 1
        if (phase, phases[phase]) in holds:
            _tell({"event": "held", "pid": os.getpid(), "phase": phase, "number": phases[phase]})
            os.kill(os.getpid(), signal.SIGSTOP)

    def on_audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _FILE_EVENTS:
            return
        # Of a rename or a link both names count: the last step of a save gives it its final name.
        names = [os.fspath(name) for name in arguments[:2] if isinstance(name, str | os.PathLike)]
        if event in {"os.remove", "os.rmdir"} and arguments[1] >= 0:  # relative to a descriptor
            names = [os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), names[0])]
        for name in names:
            if str(name).startswith(prefix):
                inside = str(name).removeprefix(prefix)
                if event == "os.rename" and _PUBLISHED.fullmatch(inside):
                    enter("publishing")
                for pattern, phase in _STAGED:
                    if pattern.match(inside):
                        enter(phase)
                        return

    def count_calls(owner: type, name: str, phase: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            enter(phase)
            return method(*arguments, **options)

        setattr(owner, name, counted)

    count_calls(TextTokenizer, "encode", "tokenising")
    count_calls(LanguageModel, "forward", "stepping")
    count_calls(LanguageModel, "document_log_likelihoods", "evaluating")
    listen = StopRequest.__enter__

    def listening(self: StopRequest) -> StopRequest:
        entered = listen(self)
        _tell({"event": "listening", "pid": os.getpid(), "time": time.monotonic()})
        return entered

    StopRequest.__enter__ = listening  # type: ignore[method-assign]
    meet = torch.distributed.init_process_group

    def met(*arguments: Any, **options: Any) -> None:
        meet(*arguments, **options)
        _tell({"event": "met", "pid": os.getpid()})

    torch.distributed.init_process_group = met
    sys.addaudithook(on_audit)
    return phases


if __name__ == "__main__":
    main()
