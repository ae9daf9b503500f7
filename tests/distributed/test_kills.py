"""kill -9 while shares are gathered and saved: no checkpoint is lost, and the training goes on."""

import json
from functools import partial

import pytest

from accel_gpt2.train.checkpoint import list_checkpoints

from .harness import RankFailedError, run
from .runs import Runs, assert_alike, steps_of
from .trainings import train, train_until_killed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All trainings of this file."""
    return Runs(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(
    ("strategy", "rank", "only_torture"),
    [("fsdp2", 0, False), ("zero3", 1, False), ("fsdp2", 1, True), ("zero3", 0, True)],
)
def test_a_kill_within_a_save_costs_the_steps_since_the_last_one(
    runs: Runs, request: pytest.FixtureRequest, strategy: str, rank: int, only_torture: bool
) -> None:
    """Of two processes that save for the second time one is killed: the first checkpoint is whole,
    and from it both come to the model of one process."""
    if only_torture and not request.config.getoption("--torture"):
        pytest.skip("of the long form (`make torture`)")
    recipe = runs.recipe("full", checkpoint_every_steps=2)
    directory = runs.folder / f"{strategy} {rank}"
    with pytest.raises(RankFailedError, match=rf"rank {rank}: died with code -9"):
        run(strategy, 2, partial(train_until_killed, rank=rank, save=2), recipe, directory)
    assert len(steps_of(directory)) == 4
    (kept,) = list_checkpoints(next(directory.glob("class-*")))
    assert kept.name == "checkpoint-2"
    run(strategy, 2, train, recipe, directory)
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "resume"] == [2]
    assert_alike(directory, runs.alone("full"))
