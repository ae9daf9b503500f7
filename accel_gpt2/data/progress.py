"""How a long pass over documents shows that it is alive: on stderr, never on stdout."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accel_gpt2.units import format_seconds


@contextmanager
def document_progress(
    description: str, total: int | None, *, show: bool
) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many documents have just been done.

    On a terminal this is a progress bar; elsewhere one plain line at the start and one at the end,
    the second with the count and the rate; with `show` false it is nothing at all.
    """
    num_done = 0

    def count(num_documents: int) -> None:
        nonlocal num_done
        num_done += num_documents

    if not show:
        yield count
        return

    started = time.perf_counter()
    if sys.stderr.isatty():
        with _terminal_bar(description, total) as advance:
            yield advance
        return
    known = "" if total is None else f": {total:,} documents"
    print(f"{description}{known} ...", file=sys.stderr, flush=True)  # noqa: T201
    yield count
    seconds = max(time.perf_counter() - started, 1e-9)
    print(  # noqa: T201
        f"{description}: {num_done:,} documents in {format_seconds(seconds)} "
        f"({num_done / seconds:,.0f} a second)",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def _terminal_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total)

        def advance(num_documents: int) -> None:
            progress.advance(task, num_documents)

        yield advance
