"""Several processes of one training, as a launcher would start them, in a second or two.

What is slow to import is imported once, in a server of `multiprocessing` from which the ranks are
forked; the process that tests never computes, so nothing of its threads is forked.
"""

import contextlib
import faulthandler
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Far above what the trainings of these tests take on a busy machine.
TIMEOUT_SECONDS = 90.0

# When one rank has failed, the others wait for it in a collective, in vain.
_SURVIVOR_SECONDS = 5.0

# A rank that gets it writes its stack.
_SAY_WHERE = signal.SIGUSR2

# What a training imports on its way.
_PRELOADED = [
    "accelerate",
    "peft",
    "transformers.models.gpt2.modeling_gpt2",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "accel_gpt2.classify.fit",
]

# What `accelerate launch` would set beside the ranks' own variables.
_ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    "single": {"ACCELERATE_USE_CPU": "true"},
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    },
}


class RankFailedError(AssertionError):
    """What failed in the processes, with their tracebacks and what they wrote."""


def run(
    strategy: str,
    num_processes: int,
    function: Callable[..., T],
    *args: Any,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[T]:
    """What `function(*args)` returns on each rank of a strategy's processes, in order.

    Function, arguments and results travel as pickles, so the function is one that a test module
    imports from another file; tensors are copied. No process is left, whatever happens.

    Raises:
        RankFailedError: when a rank raises, dies or is not done in time; the others are ended.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        environment = {
            **_ENVIRONMENTS[strategy],
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "ACCEL_GPT2_CACHE": os.environ.get("ACCEL_GPT2_CACHE", f"{folder}/cache"),
        }
        if num_processes > 1:
            environment |= {
                "WORLD_SIZE": str(num_processes),
                "LOCAL_WORLD_SIZE": str(num_processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free.getsockname()[1]),
            }
        free.close()
        ranks = [
            _Rank(rank, environment, Path(folder), function, args, timeout_seconds)
            for rank in range(num_processes)
        ]
        try:
            return _results(ranks, timeout_seconds)
        finally:
            for rank in ranks:
                rank.end()


class _Rank:
    """One process, from outside."""

    def __init__(
        self,
        number: int,
        environment: Mapping[str, str],
        folder: Path,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        timeout_seconds: float,
    ) -> None:
        self.number = number
        self.output = folder / f"rank-{number}.txt"
        self.pipe, theirs = get_context("forkserver").Pipe()
        own = dict(environment)
        if "WORLD_SIZE" in own:
            own |= {"RANK": str(number), "LOCAL_RANK": str(number)}
        # multiprocessing's own pickler would hand tensors over in shared memory.
        work = pickle.dumps((function, args))
        self.process = _forkserver().Process(
            target=_work, args=(theirs, own, str(self.output), work, timeout_seconds), daemon=True
        )
        self.process.start()
        theirs.close()

    def said(self) -> str:
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        return f"--- rank {self.number} wrote:\n{text[-6000:]}"

    def end(self) -> None:
        """Tell it to leave, or kill it."""
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(b"leave")
        self.process.join(1.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()
        self.pipe.close()


def _results(ranks: list[_Rank], timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = {rank.pipe: rank for rank in ranks}
    until = time.monotonic() + timeout_seconds
    while waiting:
        ready = connection.wait(list(waiting), max(0.0, until - time.monotonic()))
        if not ready:
            late = [rank.number for rank in waiting.values()]
            failures.append(f"ranks {late} were not done in time")
            for rank in waiting.values():
                if rank.process.pid is not None:
                    os.kill(rank.process.pid, _SAY_WHERE)
            time.sleep(0.2)
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                succeeded, content = pickle.loads(pipe.recv_bytes())
            except EOFError:
                rank.process.join(1.0)
                succeeded, content = False, f"died with code {rank.process.exitcode}"
            if succeeded:
                results[rank.number] = content
            else:
                if not failures:
                    until = min(until, time.monotonic() + _SURVIVOR_SECONDS)
                failures.append(f"rank {rank.number}: {content}")
    if failures:
        raise RankFailedError("\n".join([*failures, *(rank.said() for rank in ranks)]))
    return [results[rank.number] for rank in ranks]


@cache
def _forkserver() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _work(
    pipe: Connection, environment: dict[str, str], output: str, work: bytes, timeout: float
) -> None:
    """A rank's whole life; it never returns, because gloo's destructor sometimes does not."""
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        faulthandler.register(_SAY_WHERE, file)
        if sys.platform == "linux":
            import ctypes

            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        signal.alarm(int(timeout) + 60)  # whatever becomes of the test
        os.environ.update(environment)
        import torch

        torch.set_num_threads(1)
        function, args = pickle.loads(work)
        message = (True, function(*args))
    except BaseException:
        message = (False, traceback.format_exc())
    try:
        pipe.send_bytes(pickle.dumps(message))
        pipe.poll(timeout)  # until all are done: who leaves first would break the others' sends
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
