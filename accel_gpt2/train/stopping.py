"""Stopping on purpose: signals and time limits, noticed between steps, agreed on by all ranks."""

import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

import torch

from accel_gpt2.errors import ExitCode, StoppedEarly
from accel_gpt2.units import format_seconds

# SIGUSR1 is what schedulers send ahead of time; Windows has none.
_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)


class StopRequest:
    """Turns signals and a deadline into a question that the loop asks when it can afford to stop.

    A first signal is remembered; the loop finishes its step, saves and leaves. A second Ctrl-C
    leaves at once: what was saved before is whole. While nothing is worth saving yet
    (`saving = False`), a signal ends the work where it is.
    """

    def __init__(self, max_time_seconds: float | None = None) -> None:
        self.saving = False
        self._deadline = None if max_time_seconds is None else time.monotonic() + max_time_seconds
        self._max_time_seconds = max_time_seconds
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.saving:
            raise StoppedEarly(
                f"Stopped by {signal.Signals(number).name} before anything was worth saving.",
                ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.STOPPED,
            )
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            sys.stderr.write("\nLeaving at once; the last whole checkpoint stands.\n")
            sys.stderr.flush()
            os._exit(ExitCode.INTERRUPTED)
        self._signal = number

    def reason(self, device: torch.device) -> StoppedEarly | None:
        """Why to stop now, or None; every rank gets the same answer.

        Costs one small collective when there are several processes.
        """
        late = self._deadline is not None and time.monotonic() >= self._deadline
        code = 2 if self._signal is not None else 1 if late else 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shared = torch.tensor(code, device=device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            code = int(shared)
        if code == 2:
            name = signal.Signals(self._signal).name if self._signal else "a signal to another rank"
            return StoppedEarly(
                f"Stopped by {name}; the work is saved. Start again to go on.", ExitCode.STOPPED
            )
        if code == 1:
            limit = format_seconds(self._max_time_seconds or 0)
            return StoppedEarly(
                f"The time limit of {limit} is reached; the work is saved. Start again to go on.",
                ExitCode.LIMIT_REACHED,
            )
        return None
