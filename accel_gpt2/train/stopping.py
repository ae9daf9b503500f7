"""Stopping on purpose: signals, time and money, noticed between steps, agreed on by all ranks."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch

from accel_gpt2.errors import ExitCode, StoppedEarly
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.units import format_seconds

# SIGUSR1 is what schedulers send ahead of time; Windows has none.
_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)

# torchrun passes on the Ctrl-C that the terminal has sent to everybody; a person needs longer to
# press it again.
_SECOND_INTERRUPT_SECONDS = 1.0

# The rest of a budget pays for the last save, for a copy of it, and for billing's rounding up.
_BUDGET_SHARE = 0.95

_BY_SIGNAL = 1000  # above the number of any limit, so that a signal wins when ranks compare


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How long this start may take, and the sentence for when it has."""

    seconds: float
    reached: str


def limits_of(recipe: TrainRecipe, spent_seconds: float) -> list[Limit]:
    """The recipe's time limit, which is for one start, and its budget, which is for all of them.

    Args:
        spent_seconds: what the run has cost before this start, as time at the recipe's price.

    >>> recipe = TrainRecipe(budget_usd=3.0, price_usd_per_hour=2.0)
    >>> [(round(limit.seconds), limit.reached) for limit in limits_of(recipe, 1800)]
    [(3330, '95% of the budget of $3.00 is reached')]
    """
    limits = []
    if recipe.max_time_seconds is not None:
        time_limit = format_seconds(recipe.max_time_seconds)
        limits.append(
            Limit(
                seconds=recipe.max_time_seconds,
                reached=f"The time limit of {time_limit} is reached",
            )
        )
    if recipe.budget_usd is not None and recipe.price_usd_per_hour:
        hours = _BUDGET_SHARE * (recipe.budget_usd / recipe.price_usd_per_hour)
        limits.append(
            Limit(
                seconds=hours * 3600 - spent_seconds,
                reached=f"{_BUDGET_SHARE:.0%} of the budget of ${recipe.budget_usd:.2f} is reached",
            )
        )
    return limits


class StopRequest:
    """Turns signals and limits into a question that the loop asks when it can afford to stop.

    A first signal is remembered; the loop finishes its step, saves and leaves. A second Ctrl-C
    leaves at once: what was saved before is whole. While the data are prepared (`preparing`) there
    is nothing to finish, and a signal ends the work where it is.
    """

    def __init__(
        self, limits: Sequence[Limit] = (), *, saved: bool = False, handle_signals: bool = True
    ) -> None:
        self.preparing = True
        self.saved = saved  # whether there is work on the disk to go on from
        self.trainings = 1  # how many have to finish their step and save before the end
        self.announce: Callable[[str], None] = _write  # called from a signal handler
        # For others who have to stop too, called from a signal handler; False: at once, unsaved.
        self.pass_on: Callable[[bool], None] = lambda saves: None
        self._limits = tuple(limits)
        self._signals = _SIGNALS if handle_signals else ()
        self._started = time.monotonic()
        self._reserve_seconds = 0.0
        self._signal: int | None = None
        self._signal_time = 0.0
        self._cause = 0  # what `requested` agreed on: 0, a limit's number from 1, or _BY_SIGNAL
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        ours = error is None or isinstance(error, StoppedEarly) or not isinstance(error, Exception)
        if self.preparing and self._signal is not None and not ours:
            # A library that was being loaded or called has made an error of its own from ours.
            raise self.error() from error

    @property
    def seconds(self) -> float:
        """Since this start began."""
        return time.monotonic() - self._started

    def reserve(self, seconds: float) -> None:
        """Keep this much of every limit for what a training does between question and end."""
        self._reserve_seconds = max(self._reserve_seconds, seconds)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            if now - self._signal_time >= _SECOND_INTERRUPT_SECONDS:
                self.pass_on(False)
                _write("Leaving at once; the last whole checkpoint stands.")
                os._exit(ExitCode.INTERRUPTED)
            return
        self._signal, self._signal_time, self._cause = number, now, _BY_SIGNAL
        self.pass_on(True)
        if self.preparing:
            raise self.error()
        if number == signal.SIGINT:
            self.announce("Finishing the step and saving; Ctrl-C again leaves at once.")

    def requested(self, device: torch.device) -> bool:
        """Whether to stop now; every rank gets the same answer.

        Costs one small collective when there are several processes.
        """
        now = self.seconds + self.trainings * self._reserve_seconds
        reached = [i for i, limit in enumerate(self._limits, start=1) if now >= limit.seconds]
        cause = _BY_SIGNAL if self._signal is not None else max(reached, default=0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shared = torch.tensor(cause, device=device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            cause = int(shared)
        self._cause = cause
        return cause != 0

    def error(self) -> StoppedEarly:
        """Why the work ends, and its exit code; asked for after saving."""
        standing = (
            "the work is saved. Start again to go on."
            if self.saved
            else "nothing was worth saving yet."
        )
        if self._cause == _BY_SIGNAL:
            name = signal.Signals(self._signal).name if self._signal else "a signal to another rank"
            code = ExitCode.STOPPED if self.saved else ExitCode.INTERRUPTED
            return StoppedEarly(f"Stopped by {name}; {standing}", code)
        reached = self._limits[self._cause - 1].reached
        return StoppedEarly(f"{reached}; {standing}", ExitCode.LIMIT_REACHED)


def _write(text: str) -> None:
    # Not through sys.stderr: the handler may have interrupted a write to it.
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())
