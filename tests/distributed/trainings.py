"""What the ranks of a test do: train a tiny recipe, to its end or to a signal."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from accel_gpt2.classify.fit import fit
from accel_gpt2.errors import StoppedEarly
from accel_gpt2.recipe import ResolvedRecipe
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
