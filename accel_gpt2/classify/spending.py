"""`spent.json`, a run's ledger: how long each machine was paid for it, and at what price.

It lies beside the checkpoints and travels with them, so that a budget is for all machines together.
`python -m accel_gpt2.classify.spending RUN --usd-per-hour PRICE` brings it up to this moment, and
prints the seconds; a rented machine does so before the training and after it.
"""

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from accel_gpt2.durable import write_json
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import TrainRecipe

SPENT = "spent.json"

# When a rented machine's bill began (Unix seconds), which is before there was a trainer on it. Set
# by the run script that `accel-gpt2 cloud` renders.
BILLED_SINCE = "ACCEL_GPT2_BILLED_SINCE"

# A machine that dies takes with it what was not written down yet.
SECONDS_BETWEEN_WRITES = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineTime:
    """One rented machine's time, or that of all starts on machines that nobody bills by the hour.

    `billed_since` is a UTC time (ISO 8601), None for the latter. `seconds` are billed ones;
    `price_usd_per_hour` is of the whole machine.
    """

    billed_since: str | None
    seconds: float
    price_usd_per_hour: float | None

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
    since = _billed_since(environment)
    before = 0.0 if since is None else max(0.0, time.time() - since.timestamp())
    rows = [] if run_directory is None else read_ledger(run_directory)
    if since is not None:
        rows = [row for row in rows if row.billed_since != since.isoformat()]
    return before + sum(row.seconds_at(recipe.price_usd_per_hour) for row in rows)


def write_spent_seconds(
    run_directory: Path,
    seconds: float,
    recipe: TrainRecipe,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Note that a run has cost as much as `seconds` at today's price; this machine's row grows."""
    since = _billed_since(environment)
    this = None if since is None else since.isoformat()
    price = recipe.price_usd_per_hour
    others = [row for row in read_ledger(run_directory) if row.billed_since != this]
    here = seconds - sum(row.seconds_at(price) for row in others)
    row = MachineTime(billed_since=this, seconds=round(here, 1), price_usd_per_hour=price)
    write_json(run_directory / SPENT, {"machines": [asdict(x) for x in (*others, row)]})


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


def _billed_since(environment: Mapping[str, str]) -> datetime.datetime | None:
    text = environment.get(BILLED_SINCE)
    if text is None:
        return None
    try:
        return datetime.datetime.fromtimestamp(float(text), datetime.UTC)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"{BILLED_SINCE} = {text!r} is no time in Unix seconds: unset it, or give it as "
            "`date +%s` prints it."
        ) from None


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
