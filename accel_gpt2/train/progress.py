"""What a person sees while models train: two live lines on a terminal, plain ones elsewhere."""

import os
import sys
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from accel_gpt2.terminal import printable
from accel_gpt2.units import format_bytes, format_count, format_seconds

# Between two plain lines of the same phase.
_PLAIN_SECONDS = 10.0


class _TwoLines(Progress):
    """A bar, and the facts below it: side by side they do not fit into 80 columns."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["facts"]:
                yield Text(task.fields["facts"], no_wrap=True, overflow="ellipsis")
        if self.note:
            yield Text(self.note, style="yellow")


class TrainProgress:
    """Where a run stands: step, loss, tokens/s, MFU, time left, memory, money so far.

    Only the first rank shows anything. Without a terminal, or when quiet, the same facts come as
    plain lines, at most one in ten seconds.
    """

    def __init__(self, *, shown: bool, quiet: bool) -> None:
        self._shown = shown
        self._console = Console(stderr=True)
        self._live = shown and not quiet and self._console.is_terminal
        self._progress = _TwoLines(
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, max_width=45),  # the step stays beside long names
            ),
            TextColumn("{task.completed}/{task.total}", markup=False),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan"),
            console=self._console,
            transient=True,
            expand=True,
        )
        self._task: TaskID | None = None
        self._last_plain = 0.0

    def __enter__(self) -> "TrainProgress":
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._progress.stop()

    def start(self, description: str, total: int, completed: int = 0) -> None:
        """Begin a phase: a class's training, or an evaluation within it."""
        self._last_plain = time.monotonic()
        if self._live:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(
                printable(description), total=total, completed=completed, facts=""
            )

    def update(self, description: str, completed: int, total: int, facts: str) -> None:
        """Show where the phase stands."""
        if self._live and self._task is not None:
            self._progress.update(
                self._task,
                description=printable(description),
                completed=completed,
                total=total,
                facts=facts,
                refresh=True,
            )
        elif self._shown and (
            time.monotonic() - self._last_plain >= _PLAIN_SECONDS or completed == total
        ):
            self._last_plain = time.monotonic()
            self._write(f"{description} {completed}/{total} {facts}".rstrip())

    def note(self, line: str) -> None:
        """A line below the bar; safe in a signal handler, where nothing may be printed."""
        if self._live:
            self._progress.note = line  # the display's own thread shows it
        elif self._shown:
            os.write(2, f"{line}\n".encode())

    def say(self, line: str) -> None:
        """A line that stays."""
        if not self._shown:
            return
        if self._live:
            self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
        else:
            self._write(line)

    def _write(self, line: str) -> None:
        sys.stderr.write(printable(line) + "\n")
        sys.stderr.flush()


def describe_step(
    *,
    loss: float,
    tokens_per_second: float,
    mfu: float | None,
    seconds_left: float,
    peak_memory_bytes: int,
    cost_usd: float | None,
) -> str:
    """The facts of a progress line; what is unknown is left out, never guessed.

    >>> describe_step(loss=4.2, tokens_per_second=21500, mfu=None, seconds_left=75,
    ...               peak_memory_bytes=2**30, cost_usd=0.021)
    'loss 4.200 · 21.5k tok/s · 1 min 15 s left · 1.00 GiB · $0.02'
    """
    facts = [f"loss {loss:.3f}", f"{format_count(tokens_per_second)} tok/s"]
    if mfu is not None:
        facts.append(f"MFU {mfu:.0%}")
    facts += [f"{format_seconds(seconds_left)} left", format_bytes(peak_memory_bytes)]
    if cost_usd is not None:
        facts.append(f"${cost_usd:.2f}")
    return " · ".join(facts)
