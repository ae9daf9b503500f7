"""Placed trainings whose children are forked from a process that has imported everything."""

import io
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from accel_gpt2.classify import placed, placed_child
from accel_gpt2.recipe import ResolvedRecipe

from .trainings import train_each


class ForkedChild:
    """A process of `placed_child`, with as much of `Popen` as `placed` uses.

    It is forked, where `placed.start_child` would begin with importing torch; environment, pipes,
    session and signals are those of a process that was started anew.
    """

    def __init__(self, environment: Mapping[str, str], lock: int) -> None:
        assignment, stdin = os.pipe()
        stdout, events = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(stdin)
            _be_child(environment, assignment, events)
        os.close(assignment)
        os.close(events)
        self.stdin = os.fdopen(stdin, "wb")
        self.stdout = os.fdopen(stdout, "rb", buffering=0)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def _be_child(environment: Mapping[str, str], assignment: int, events: int) -> None:
    code: Any = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        os.dup2(assignment, 0)
        os.dup2(events, 1)
        os.close(events)
        sys.stdin = io.TextIOWrapper(os.fdopen(0, "rb"))
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        placed_child.main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def train_each_placed(trainings: Sequence[tuple[ResolvedRecipe, Path]]) -> None:
    """One recipe after another, the classes of each in forked children."""
    placed.start_child = ForkedChild  # type: ignore[assignment]
    train_each(trainings)
