"""`spent.json`, a run's ledger: how long each machine was paid for it, and at what price.

It lies beside the checkpoints and travels with them, so that a budget is for all machines together.
`python -m accel_gpt2.classify.spending RUN --usd-per-hour PRICE` brings it up to this moment, and
prints the seconds; a rented machine does so before the training and after it. What is billed before
anything runs there, or where nothing of ours ever does, whoever launched it notes as the launch's.
"""

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from accel_gpt2.durable import write_json
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import TrainRecipe

SPENT = "spent.json"

# When a rented machine's bill began (Unix seconds), which is before there was a trainer on it. Set
# by the run script that `accel-gpt2 cloud` renders.
BILLED_SINCE = "ACCEL_GPT2_BILLED_SINCE"
LAUNCH = "ACCEL_GPT2_LAUNCH"  # by which launch it was rented, set beside it

# A machine that dies takes with it what was not written down yet.
SECONDS_BETWEEN_WRITES = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineTime:
    """One rented machine's time, or that of all starts on machines that nobody bills by the hour.

    `billed_since` is a UTC time (ISO 8601), None for the latter, and None beside a `launch` for
    what that launch is counted as until a machine of it has a row of its own. `seconds` are billed
    ones; `price_usd_per_hour` is of the whole machine.
    """

    billed_since: str | None
    seconds: float
    price_usd_per_hour: float | None
    launch: str | None = None

    @property
    def key(self) -> tuple[str | None, str | None]:
        """Which machine it is."""
        return self.launch, self.billed_since

    def seconds_at(self, price_usd_per_hour: float | None) -> float:
        """The time that costs as much at another price; the same where one of them is unknown.

        >>> MachineTime(billed_since=None, seconds=600, price_usd_per_hour=4.0).seconds_at(2.0)
        1200.0
        """
        if not self.price_usd_per_hour or not price_usd_per_hour:
            return self.seconds
        return self.seconds * self.price_usd_per_hour / price_usd_per_hour


def read_spent_seconds(
    run_directory: Path | None, recipe: TrainRecipe, environment: Mapping[str, str] = os.environ
) -> float:
    """What a run has cost before this moment, as time at today's price.

    That is the time of all other machines, and what this one was billed before: setting it up is
    paid for as well.

    Args:
        run_directory: None for a run that starts anew.

    Raises:
        UserError: when the record is damaged: without it a budget would be spent twice.
    """
    since, this = _this_machine(environment)
    before = 0.0 if since is None else max(0.0, time.time() - since.timestamp())
    rows = [] if run_directory is None else read_ledger(run_directory)
    if since is not None:
        rows = _others(rows, this)
    return before + sum(row.seconds_at(recipe.price_usd_per_hour) for row in rows)


def write_spent_seconds(
    run_directory: Path,
    seconds: float,
    recipe: TrainRecipe,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Note that a run has cost as much as `seconds` at today's price; this machine's row grows."""
    _, this = _this_machine(environment)
    launch, since = this
    price = recipe.price_usd_per_hour
    others = _others(read_ledger(run_directory), this)
    here = seconds - sum(row.seconds_at(price) for row in others)
    row = MachineTime(
        billed_since=since, seconds=round(here, 1), price_usd_per_hour=price, launch=launch
    )
    write_ledger(run_directory, (*others, row))


def _others(rows: Iterable[MachineTime], this: tuple[str | None, str | None]) -> list[MachineTime]:
    """Without this machine's row, and what its launch was counted as before it had one."""
    counted_as = (this[0], None) if this[0] is not None else this
    return [row for row in rows if row.key not in {this, counted_as}]


def note_launch(run_directory: Path, launch: str, *, seconds: float, usd_per_hour: float) -> None:
    """Count a launch of which no machine has a row: its set-up failed, or nothing was fetched."""
    row = MachineTime(
        billed_since=None,
        seconds=round(seconds, 1),
        price_usd_per_hour=usd_per_hour,
        launch=launch,
    )
    run_directory.mkdir(parents=True, exist_ok=True)
    write_ledger(run_directory, merged_ledgers(read_ledger(run_directory), [row]))


def merged_ledgers(*ledgers: Iterable[MachineTime]) -> list[MachineTime]:
    """Each machine once, with the longest of its times; a machine's row in place of its launch's.

    >>> estimate = MachineTime(
    ...     billed_since=None, seconds=900, price_usd_per_hour=2.0, launch="accel-gpt2-a-1b"
    ... )
    >>> machine = MachineTime(
    ...     billed_since="2026", seconds=700, price_usd_per_hour=2.0, launch="accel-gpt2-a-1b"
    ... )
    >>> [row.seconds for row in merged_ledgers([estimate], [machine], [estimate])]
    [700]
    """
    longest: dict[object, MachineTime] = {}
    for row in (row for ledger in ledgers for row in ledger):
        before = longest.get(row.key)
        if before is None or row.seconds > before.seconds:
            longest[row.key] = row
    seen = {row.launch for row in longest.values() if row.billed_since is not None}
    seen.discard(None)
    return [x for x in longest.values() if x.billed_since is not None or x.launch not in seen]


def write_ledger(run_directory: Path, rows: Iterable[MachineTime]) -> None:
    """Replace a run's ledger."""
    write_json(run_directory / SPENT, {"machines": [asdict(row) for row in rows]})


def spent_usd(run_directory: Path) -> float:
    """What a run has cost so far, as far as prices are known.

    Raises:
        UserError: when the record is damaged.
    """
    rows = read_ledger(run_directory)
    return sum(row.seconds / 3600 * (row.price_usd_per_hour or 0.0) for row in rows)


def read_ledger(run_directory: Path) -> list[MachineTime]:
    """The machines that a run was on; none for a run that has not begun.

    Raises:
        UserError: when the record is damaged.
    """
    path = run_directory / SPENT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "seconds" in content:  # what runs wrote before machines were told apart
            content = {"machines": [{"billed_since": None, "price_usd_per_hour": None, **content}]}
        return [
            MachineTime(
                billed_since=row["billed_since"],
                seconds=float(row["seconds"]),
                price_usd_per_hour=None
                if row["price_usd_per_hour"] is None
                else float(row["price_usd_per_hour"]),
                launch=row.get("launch"),
            )
            for row in content["machines"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}); write the seconds that the "
            'run took so far into it, as {"seconds": 3600}, or remove it to count from 0.'
        ) from None


def _this_machine(
    environment: Mapping[str, str],
) -> tuple[datetime.datetime | None, tuple[str | None, str | None]]:
    """Since when this machine is billed, and its key in the ledger."""
    text = environment.get(BILLED_SINCE)
    if text is None:
        return None, (None, None)
    try:
        since = datetime.datetime.fromtimestamp(float(text), datetime.UTC)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"{BILLED_SINCE} = {text!r} is no time in Unix seconds: unset it, or give it as "
            "`date +%s` prints it."
        ) from None
    return since, (environment.get(LAUNCH), since.isoformat())


def main() -> None:
    """Note all that this machine was billed, also where no training writes anything."""
    parser = argparse.ArgumentParser(prog="python -m accel_gpt2.classify.spending")
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("--usd-per-hour", type=float, required=True)
    arguments = parser.parse_args()
    recipe = TrainRecipe(price_usd_per_hour=arguments.usd_per_hour)
    arguments.run_directory.mkdir(parents=True, exist_ok=True)
    spent_seconds = read_spent_seconds(arguments.run_directory, recipe)
    write_spent_seconds(arguments.run_directory, spent_seconds, recipe)
    sys.stdout.write(f"{spent_seconds:.0f}\n")


if __name__ == "__main__":
    main()
