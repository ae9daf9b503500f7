"""Where words and data go: data to stdout, talk to stderr, `--json` one document on stdout."""

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from typing import Literal

from accel_gpt2.errors import UsageError
from accel_gpt2.terminal import printable

_SURROGATE = re.compile("[\ud800-\udfff]")


def is_main_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process may talk: the only one, or rank 0 of those a launcher started.

    >>> is_main_process({}), is_main_process({"RANK": "0"}), is_main_process({"LOCAL_RANK": "1"})
    (True, True, False)
    """
    return environment.get("RANK", environment.get("LOCAL_RANK", "0")) == "0"


def check_ranks(environment: Mapping[str, str] = os.environ) -> None:
    """Check the variables by which a launcher numbers its processes, before anything reads them.

    Raises:
        UsageError: when one of them is no number, or the numbers do not go together.

    >>> check_ranks({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    """
    numbers = {}
    for name, at_least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        text = environment.get(name, str(at_least))
        numbers[name] = int(text) if re.fullmatch("[0-9]{1,9}", text) else -1
        if numbers[name] < at_least:
            raise UsageError(
                f"{name} = {text!r}: a launcher sets it to a whole number from {at_least}; unset "
                "it, or start with `accelerate launch`."
            )
    for name in ("RANK", "LOCAL_RANK"):
        if numbers[name] >= numbers["WORLD_SIZE"]:
            raise UsageError(
                f"{name} = '{numbers[name]}' and WORLD_SIZE = '{numbers['WORLD_SIZE']}': ranks "
                "count from 0 to below the number of processes; unset both, or start with "
                "`accelerate launch`."
            )


def say(text: str, *, style: str = "") -> None:
    """Talk: one message to stderr, from the main process only.

    Long lines are left to the terminal to break, so that paths and commands can be copied; control
    characters, whoever wrote them, are shown as escapes.
    """
    if is_main_process():
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, highlight=False).print(
            Text(printable(text), style=style), soft_wrap=True
        )


def warn(text: str) -> None:
    """Something that the person should know before the work goes on."""
    say(f"Warning: {text}", style="yellow")


def print_line(text: str) -> None:
    """Data: one line to stdout, exactly as it is."""
    sys.stdout.write(text + "\n")


def print_json(document: object) -> None:
    """Data: the one JSON document of a `--json` answer, indented, NaN-free."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    if _SURROGATE.search(
        text
    ):  # of a path that is not UTF-8, which JSON can hold as an escape only
        text = json.dumps(document, indent=2, allow_nan=False)
    print_line(text)


def print_table(columns: Mapping[str, Literal["left", "right"]], rows: list[list[str]]) -> None:
    """Data: a table to stdout; `columns` maps each heading to the side that its cells keep to."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading, side in columns.items():
        table.add_column(heading, justify=side, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # Python's own width, because rich prints nothing at all where COLUMNS is 0.
    Console(highlight=False, width=shutil.get_terminal_size().columns).print(table)
