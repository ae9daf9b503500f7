"""What the ranks of a test do: train a tiny recipe, to its end or to a signal."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accel_gpt2.classify.fit import fit
from accel_gpt2.errors import StoppedEarly
from accel_gpt2.recipe import ResolvedRecipe
from accel_gpt2.train.deepspeed import DeepSpeedBackend
from accel_gpt2.train.fsdp2 import Fsdp2Backend
from accel_gpt2.train.stopping import StopRequest


def train(resolved: ResolvedRecipe, run: Path) -> None:
    """The whole recipe."""
    fit(resolved, run, quiet=True)


def train_each(trainings: Sequence[tuple[ResolvedRecipe, Path]]) -> None:
    """One recipe after another, each into its own directory."""
    for resolved, run in trainings:
        try:
            fit(resolved, run, quiet=True)
        except Exception as error:
            error.add_note(f"in {run}")
            raise


def train_until(resolved: ResolvedRecipe, run: Path, *, question: int, rank: int) -> int:
    """Until one rank gets a SIGTERM when it asks for the `question`-th time whether to stop.

    Returns:
        The exit code.
    """
    ask = StopRequest.requested
    asked = 0

    def counting(self: StopRequest, device: object) -> bool:
        nonlocal asked
        asked += 1
        if asked == question and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, device)  # type: ignore[arg-type]

    StopRequest.requested = counting  # type: ignore[method-assign,assignment]
    try:
        fit(resolved, run, quiet=True)
    except StoppedEarly as stopped:
        return int(stopped.exit_code)
    return 0


def train_until_killed(resolved: ResolvedRecipe, run: Path, *, rank: int, save: int) -> None:
    """Until one rank kills itself within its `save`-th save: the first when the files are written
    and not yet in place, another before it gives its shares of the optimizer's state."""
    if int(os.environ.get("RANK", "0")) == rank:
        saves = 0

        def die_at_last() -> None:
            nonlocal saves
            saves += 1
            if saves == save:
                os.kill(os.getpid(), signal.SIGKILL)

        if rank == 0:
            sys.addaudithook(
                lambda event, names: (
                    die_at_last()
                    if event == "os.rename" and "/checkpoint-" in os.fspath(names[1])
                    else None
                )
            )
        else:
            for backend in (Fsdp2Backend, DeepSpeedBackend):
                _call_first(backend, "gathered_optimizer_state", die_at_last)
    fit(resolved, run, quiet=True)


def _call_first(owner: type, name: str, first: Callable[[], None]) -> None:
    method = getattr(owner, name)

    def with_first(self: object) -> Any:
        first()
        return method(self)

    setattr(owner, name, with_first)
