"""The ledger: machines are told apart, each counts at its own price, and from when it is billed."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from accel_gpt2.classify.spending import (
    BILLED_SINCE,
    LAUNCH,
    note_launch,
    read_ledger,
    read_spent_seconds,
    write_spent_seconds,
)
from accel_gpt2.errors import UsageError
from accel_gpt2.recipe import TrainRecipe

CHEAP = TrainRecipe(price_usd_per_hour=1.0)
DEAR = TrainRecipe(price_usd_per_hour=4.0)


def _billed_for(seconds: float) -> dict[str, str]:
    return {BILLED_SINCE: f"{time.time() - seconds:.0f}"}


def test_a_rented_machine_counts_from_its_bill(tmp_path: Path) -> None:
    """What set-up took is spent before the training begins, also when the run starts anew."""
    environment = _billed_for(600)
    assert read_spent_seconds(tmp_path, CHEAP, environment) == pytest.approx(600, abs=2)
    assert read_spent_seconds(None, CHEAP, environment) == pytest.approx(600, abs=2)
    assert read_spent_seconds(tmp_path, CHEAP, {}) == 0


def test_a_second_start_on_one_machine_is_not_counted_twice(tmp_path: Path) -> None:
    """The machine's row grows with the clock, whatever the first start had noted."""
    environment = _billed_for(600)
    write_spent_seconds(tmp_path, 500, CHEAP, environment)
    assert read_spent_seconds(tmp_path, CHEAP, environment) == pytest.approx(600, abs=2)
    write_spent_seconds(tmp_path, 610, CHEAP, environment)
    (row,) = read_ledger(tmp_path)
    assert (row.seconds, row.price_usd_per_hour) == (610, 1.0)


def test_each_machine_counts_at_its_own_price(tmp_path: Path) -> None:
    """An hour at $4 is four hours of a budget at $1, and the ledger keeps it as one at $4."""
    dear, cheap = _billed_for(9000), _billed_for(60)
    write_spent_seconds(tmp_path, 3600, DEAR, dear)
    spent = read_spent_seconds(tmp_path, CHEAP, cheap)
    assert spent == pytest.approx(4 * 3600 + 60, abs=2)
    write_spent_seconds(tmp_path, spent + 40, CHEAP, cheap)
    first, second = read_ledger(tmp_path)
    assert (first.seconds, first.price_usd_per_hour) == (3600, 4.0)
    assert second.seconds == pytest.approx(100, abs=2)
    assert second.price_usd_per_hour == 1.0
    own = read_spent_seconds(tmp_path, DEAR, {})  # then on a machine of one's own, at $4
    assert own == pytest.approx(3600 + 25, abs=2)
    write_spent_seconds(tmp_path, own + 10, DEAR, {})
    assert [row.seconds for row in read_ledger(tmp_path)][2] == pytest.approx(10, abs=0.2)


def test_what_runs_wrote_before_goes_on(tmp_path: Path) -> None:
    """The seconds of a record without machines count at today's price."""
    (tmp_path / "spent.json").write_text(json.dumps({"seconds": 3600}))
    assert read_spent_seconds(tmp_path, DEAR, {}) == 3600
    write_spent_seconds(tmp_path, 3700, DEAR, {})
    assert read_spent_seconds(tmp_path, CHEAP, {}) == 4 * 3700


def test_a_wrong_clock_is_named(tmp_path: Path) -> None:
    """A budget that cannot be kept is no budget."""
    with pytest.raises(UsageError, match=r"BILLED_SINCE = 'noon' is no time in Unix seconds"):
        read_spent_seconds(tmp_path, CHEAP, {BILLED_SINCE: "noon"})


def test_a_launch_counts_until_its_machine_has_a_row(tmp_path: Path) -> None:
    """What somebody else noted of a machine gives way to what the machine itself says."""
    note_launch(tmp_path, "accel-gpt2-a-1b", seconds=900, usd_per_hour=4.0)
    assert read_spent_seconds(tmp_path, CHEAP, {}) == 3600
    other = _billed_for(60)
    assert read_spent_seconds(tmp_path, CHEAP, other) == pytest.approx(3660, abs=2)
    machine = {**_billed_for(600), LAUNCH: "accel-gpt2-a-1b"}
    assert read_spent_seconds(tmp_path, DEAR, machine) == pytest.approx(600, abs=2)
    write_spent_seconds(tmp_path, 610, DEAR, machine)
    note_launch(tmp_path, "accel-gpt2-a-1b", seconds=900, usd_per_hour=4.0)
    (row,) = read_ledger(tmp_path)
    assert (row.seconds, row.launch) == (610, "accel-gpt2-a-1b")


def test_a_machine_keeps_what_others_cost(tmp_path: Path) -> None:
    """Neither a start at home nor another launch is taken for this machine's."""
    write_spent_seconds(tmp_path, 100, CHEAP, {})
    note_launch(tmp_path, "accel-gpt2-a-1b", seconds=900, usd_per_hour=1.0)
    for environment in (_billed_for(60), {**_billed_for(60), LAUNCH: "accel-gpt2-a-2c"}):
        spent = read_spent_seconds(tmp_path, CHEAP, environment)
        assert spent == pytest.approx(1060, abs=2)
        write_spent_seconds(tmp_path, spent, CHEAP, environment)
        assert [row.seconds for row in read_ledger(tmp_path)][:2] == [100, 900]
        (tmp_path / "spent.json").write_text(
            json.dumps({"machines": [asdict(row) for row in read_ledger(tmp_path)[:2]]})
        )
    write_spent_seconds(tmp_path, 1050, CHEAP, {})
    assert sorted(row.seconds for row in read_ledger(tmp_path)) == [150, 900]
