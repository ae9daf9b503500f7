"""kill -9 at any moment: nothing half-written is ever chosen, and nothing of the result is lost."""

import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from .harness import (
    ForkServer,
    Hold,
    Reference,
    Start,
    assert_same_result,
    check_whole,
    explained,
    newest_steps,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One start that ends by kill -9: when, and which ranks."""

    hold: Hold | None  # aimed: at the `number`-th file event of a save; None: after `seconds`
    seconds: float  # after the hold, or after the start
    victims: tuple[int, ...]


def plan_kill(reference: Reference, run: Path, chance: random.Random, *, aimed: bool) -> Kill:
    """A moment of what is left of a run, drawn from a seed."""
    victims = chance.choice([(0,), (1,), (0, 1)][: 2 * reference.world_size - 1])
    left = reference.part_left(run)
    if not aimed:
        seconds = chance.uniform(0.0, reference.seconds * (0.3 + 0.5 * left))
        return Kill(hold=None, seconds=seconds, victims=victims)
    phases = ["saving", "publishing", "rotating", "exporting", "recording"]
    phase = chance.choices(phases, [4, 3, 2, 2, 1])[0]
    most = reference.phases[0][phase] * (0.5 if phase == "exporting" else left)
    hold = Hold(phase=phase, number=chance.randint(1, max(1, int(most))))
    seconds = chance.choice([0.0, 0.0, chance.uniform(0.0, 0.03)])
    return Kill(hold=hold, seconds=seconds, victims=victims)


def kill_as_planned(start: Start, kill: Kill) -> bool:
    """Whether a process was there to be killed; the others have then ended by themselves."""
    if kill.hold is None:
        start.run_for(kill.seconds)
    elif start.wait_until_held() and kill.seconds > 0:
        start.go_on()
        start.run_for(kill.seconds)
    alive = [rank for rank in kill.victims if start.ranks[rank].code is None]
    for rank in alive:
        start.send(rank, signal.SIGKILL)
    start.go_on()
    if not alive:
        start.wait()
    return bool(alive)


@pytest.mark.parametrize(
    ("name", "num_kills", "num_kills_torture"),
    [("full", 24, 200), ("lora", 12, 100), ("two", 18, 150)],
    ids=["one-process", "lora", "two-processes"],
)
def test_killed_runs_end_as_if_nothing_had_happened(
    references: dict[str, Reference],
    server: ForkServer,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
    name: str,
    num_kills: int,
    num_kills_torture: int,
) -> None:
    """Every second kill is aimed at a save; what there is is always whole, and the end is equal."""
    torture = request.config.getoption("--torture")
    seed = request.config.getoption("--torture-seed")
    reference = references[name]
    chance = random.Random(f"{name} {seed}")
    counts: Counter[str] = Counter()
    slowest_survivor = 0.0
    run = tmp_path / "run-1"
    runs, starts, processes = 1, server.num_starts, server.num_processes
    while True:
        enough = counts["kills"] >= (num_kills_torture if torture else num_kills)
        kill = plan_kill(reference, run, chance, aimed=counts["kills"] % 2 == 0)
        steps = newest_steps(run)
        holds = () if enough or kill.hold is None else (kill.hold,)
        start = server.start(run, reference.recipe, world_size=reference.world_size, holds=holds)
        with explained(start, f"{name} {seed}, kill {counts['kills'] + 1}: {kill}"):
            killed = not enough and kill_as_planned(start, kill)
            if killed:
                slowest_survivor = max(slowest_survivor, start.wait_for_survivors())
                for rank in set(range(reference.world_size)) - set(kill.victims):
                    assert start.codes[rank] != 0 or (run / "calibration.json").exists()
                counts["kills"] += 1
                counts["kills_aimed_at_a_save"] += kill.hold is not None
                counts["kills_that_cut_a_save_short"] += check_whole(run)
                steps_now = newest_steps(run)
                for directory, step in steps.items():
                    assert steps_now.get(directory, -1) >= step, "a kill has cost a checkpoint"
                continue
            assert start.wait() == [0] * reference.world_size
            assert_same_result(run, reference.run)
        shutil.rmtree(run)
        if enough:
            break
        runs += 1
        run = tmp_path / f"run-{runs}"
    record_property("seed", seed)
    record_property("runs", runs)
    record_property("starts", server.num_starts - starts)
    record_property("processes", server.num_processes - processes)
    for key, count in counts.items():
        record_property(key, count)
    if reference.world_size > 1:
        record_property("slowest_survivor_seconds", round(slowest_survivor, 2))
    assert counts["kills_that_cut_a_save_short"] >= counts["kills"] // 10, "the aim has moved"


def test_a_kill_in_the_last_rotation_leaves_nothing_for_ever(
    references: dict[str, Reference],
    server: ForkServer,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """What no later save would clear away, as large as a checkpoint, is gone after a start."""
    reference = references["full"]
    last = Hold(phase="rotating", number=reference.phases[0]["rotating"])
    start = server.start(tmp_path / "run", reference.recipe, holds=(last,))
    with explained(start, last):
        assert start.wait_until_held()
        start.kill()
    assert list(tmp_path.glob("run/class-1-*/.staging-removed-*"))
    start = server.start(tmp_path / "run", reference.recipe)
    with explained(start, "the start after the kill"):
        assert start.wait() == [0]
        assert_same_result(tmp_path / "run", reference.run)
    record_property("kills", 1)
    record_property("kills_aimed_at_a_save", 1)


def test_a_kill_while_a_checkpoint_is_replaced(
    references: dict[str, Reference],
    server: ForkServer,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """A stop within an evaluation saves its step, which is saved again when that is done: a kill
    between the two renames, when no checkpoint has that name, costs nothing."""
    reference, run = references["full"], tmp_path / "run"
    evaluation = Hold(phase="evaluating", number=1)
    start = server.start(run, reference.recipe, holds=(evaluation,))
    with explained(start, evaluation):
        assert start.wait_until_held()
        start.send(0, signal.SIGTERM)
        start.go_on()
        assert start.wait() == [75]
    (step,) = newest_steps(run).values()
    rename = Hold(phase="publishing", number=1)
    start = server.start(run, reference.recipe, holds=(rename,))
    with explained(start, rename):
        assert start.wait_until_held()
        start.kill()
    assert list(run.glob(f"class-0-*/.staging-replaced-checkpoint-{step}"))
    assert not list(run.glob(f"class-0-*/checkpoint-{step}"))
    check_whole(run)  # `best` has not been told yet
    start = server.start(run, reference.recipe)
    with explained(start, "the start after the kill"):
        assert start.wait() == [0]
        assert f"goes on from {run}" in start.output()
        assert f"checkpoint-{step}" in start.output()
        assert_same_result(run, reference.run)
    record_property("kills", 1)
    record_property("kills_aimed_at_a_save", 1)
