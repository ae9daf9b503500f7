"""Several processes of one training, as a launcher would start them, in a second or two.

What is slow to import is imported once, in a server of `multiprocessing` from which the ranks are
forked; the process that tests never computes, so nothing of its threads is forked.
"""

import contextlib
import os
import pickle
import runpy
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

from accel_gpt2.render.accelerate import ACCELERATE_DIRECTORY, config_files

T = TypeVar("T")

# Far above what the trainings of these tests take on a busy machine.
TIMEOUT_SECONDS = 90.0

# When one rank has failed, the others wait for it in a collective, in vain.
_SURVIVOR_SECONDS = 5.0


# What a training imports on its way.
_PRELOADED = [
    "accelerate",
    "peft",
    "transformers.models.gpt2.modeling_gpt2",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch._dynamo",
    "deepspeed",
    "accel_gpt2.classify.fit",
]


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
            **_launched_environment(strategy, num_processes, Path(folder)),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "ACCEL_GPT2_CACHE": os.environ.get("ACCEL_GPT2_CACHE", f"{folder}/cache"),
        }
        if strategy != "single":
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
        rank = (theirs, own, str(self.output), work, timeout_seconds)
        # By its path: what is installed may have a package `tests` that is not ours.
        self.process = _forkserver().Process(
            target=runpy.run_path,
            args=(str(Path(__file__).with_name("rank.py")), {"ARGUMENTS": rank}, "rank"),
            daemon=True,
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
                    os.kill(rank.process.pid, signal.SIGUSR2)  # it writes its stack
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


def _launched_environment(strategy: str, num_processes: int, folder: Path) -> dict[str, str]:
    """What `accelerate launch` sets for our file of a strategy, beside the ranks' own variables."""
    if strategy == "single":
        return {}
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    for path, text in config_files(str(folder)).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)
    file = folder / ACCELERATE_DIRECTORY / f"{strategy}.yaml"
    words = ["--config_file", str(file), "--num_processes", str(num_processes), "train.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(args)
    else:
        environment = prepare_multi_gpu_env(args)
    return {key: value for key, value in environment.items() if os.environ.get(key) != value}


@cache
def _forkserver() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context
