"""Several processes as one: what the first does for all, what they wait for and how long."""

import multiprocessing
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from accel_gpt2.errors import DoesNotFitError, ExitCode, UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train import processes
from accel_gpt2.train.peers import COLLECTIVE_TIMEOUT, PeerFailedError
from accel_gpt2.train.processes import build_accelerator, on_first_process


def _in_two_processes(work: Callable[[], Any], folder: Path) -> list[Any]:
    """What `on_first_process` comes to in each of two gloo processes; an error as its parts."""
    context = multiprocessing.get_context("fork")

    def run(rank: int, told: Any) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
        )
        accelerator = SimpleNamespace(num_processes=2, is_main_process=rank == 0)
        try:
            answer: Any = on_first_process(accelerator, work)
        except Exception as error:
            answer = (type(error).__name__, str(error), getattr(error, "exit_code", None))
        told.send(answer)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=run, args=(rank, pipes[rank][1]), daemon=True) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    answers = [here.recv() if here.poll(60) else None for here, _ in pipes]
    for process in ranks:
        process.join(20)
        process.kill()
    return answers


def test_the_first_process_works_and_all_have_the_result(tmp_path: Path) -> None:
    """The work is done once; every process gets what it gave."""

    def work() -> int:
        with (tmp_path / "done").open("a") as file:
            file.write("x")
        return 7

    assert _in_two_processes(work, tmp_path) == [7, 7]
    assert (tmp_path / "done").read_text() == "x"


def _does_not_fit() -> None:
    raise DoesNotFitError("It needs 20 GiB.")


def _full_disk() -> None:
    raise OSError(28, "No space left on device", "a.json")


def _unexpected() -> None:
    raise KeyError("step")


@pytest.mark.parametrize(
    ("work", "first", "other"),
    [
        (
            _does_not_fit,
            ("DoesNotFitError", "It needs 20 GiB.", ExitCode.DOES_NOT_FIT),
            ("PeerFailedError", "It needs 20 GiB.", ExitCode.DOES_NOT_FIT),
        ),
        (
            _full_disk,
            ("OSError", "[Errno 28] No space left on device: 'a.json'", None),
            (
                "PeerFailedError",
                "No space left on device: a.json. What was saved before is intact; make room and "
                "start again to go on.",
                ExitCode.FAILED,
            ),
        ),
        (
            _unexpected,
            ("KeyError", "'step'", None),
            ("PeerFailedError", "KeyError: 'step'", ExitCode.FAILED),
        ),
    ],
)
def test_what_the_first_process_fails_with_reaches_all(
    tmp_path: Path, work: Callable[[], Any], first: Any, other: Any
) -> None:
    """The first one raises its own error; the others one of the same words and exit code."""
    assert _in_two_processes(work, tmp_path) == [first, other]
    assert issubclass(PeerFailedError, UserError)


def test_collectives_outlast_the_slowest_save_and_end_a_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process group that Accelerate opens has our time-out, not the backend's own: NCCL's ten
    minutes are less than the first process may need to save to a slow disk."""
    assert timedelta(minutes=20) <= COLLECTIVE_TIMEOUT
    monkeypatch.setattr(processes, "COLLECTIVE_TIMEOUT", timedelta(minutes=17))  # nobody's default
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**launched, "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        build_accelerator(TrainRecipe(model="gpt2-tiny", trackers=()))
        assert torch.distributed.is_initialized()
        group: Any = torch.distributed.group.WORLD
        backend = group._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(minutes=17)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
