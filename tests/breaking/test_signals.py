"""SIGTERM, SIGINT and SIGUSR1 in every phase, to one rank or to all: saved, or nothing to lose."""

import dataclasses
import itertools
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from accel_gpt2.errors import ExitCode

from .harness import (
    ForkServer,
    Hold,
    Reference,
    Start,
    assert_same_result,
    check_whole,
    explained,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What rank 0 is doing when a signal comes, and how every rank must end.

    Of what only one rank does, the one that does it.
    """

    name: str
    hold: str  # as forkserver.py calls it
    numbers: tuple[int, int]  # which of them in this start: drawn from here to here
    code: ExitCode


# In the order of a run, so that each start comes as far as the next phase.
PHASES = (
    Phase(name="tokenising", hold="tokenising", numbers=(1, 1), code=ExitCode.INTERRUPTED),
    # Before the first step, a micro batch is tried for size.
    Phase(name="warming up", hold="stepping", numbers=(1, 1), code=ExitCode.INTERRUPTED),
    Phase(name="the first step", hold="stepping", numbers=(2, 2), code=ExitCode.STOPPED),
    Phase(name="a step", hold="stepping", numbers=(2, 8), code=ExitCode.STOPPED),
    Phase(name="an evaluation", hold="evaluating", numbers=(1, 2), code=ExitCode.STOPPED),
    Phase(name="a save", hold="saving", numbers=(1, 60), code=ExitCode.STOPPED),
    # Of the first class: the second is still to come.
    Phase(name="an export", hold="exporting", numbers=(1, 20), code=ExitCode.STOPPED),
    # Of the last class: all training is done, and what is left takes no time.
    Phase(name="the last export", hold="exporting", numbers=(1, 20), code=ExitCode.DONE),
    Phase(name="calibration", hold="calibrating", numbers=(1, 2), code=ExitCode.DONE),
)


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Drawn from --torture-seed and the test's name."""
    seed = request.config.getoption("--torture-seed")
    request.node.user_properties.append(("seed", seed))
    return random.Random(f"{request.node.name} {seed}")


def _finish(server: ForkServer, reference: Reference, run: Path) -> None:
    """Started again, a run ends as the one that nothing has stopped."""
    start = server.start(run, reference.recipe, world_size=reference.world_size)
    with explained(start, "the start after the signal"):
        assert start.wait() == [0] * reference.world_size
        assert_same_result(run, reference.run)
    shutil.rmtree(run)


def _start_held(
    server: ForkServer, reference: Reference, run: Path, holds: tuple[Hold, ...]
) -> Start:
    start = server.start(
        run,
        reference.recipe,
        world_size=reference.world_size,
        holds=holds,
        # Of its own, so that there is something to tokenise.
        environment={"ACCEL_GPT2_CACHE": str(run.parent / f"cache-{run.name}")},
    )
    with explained(start, holds):
        assert start.wait_until_held(), "the phase was not reached"
    return start


@pytest.mark.parametrize(
    ("name", "rounds_torture"),
    [("full", 12), ("lora", 6), ("two", 12)],
    ids=["one-process", "lora", "two-processes"],
)
def test_signals_in_every_phase(
    references: dict[str, Reference],
    server: ForkServer,
    tmp_path: Path,
    chance: random.Random,
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
    name: str,
    rounds_torture: int,
) -> None:
    """130 before there is work, 75 with it saved, 0 when all is done, on all ranks alike."""
    reference = references[name]
    starts, processes = server.num_starts, server.num_processes
    signals = itertools.cycle(chance.sample(SIGNALS, 3))
    rounds = rounds_torture if request.config.getoption("--torture") else 1
    for round_number in range(rounds):
        run = tmp_path / f"run-{round_number}"
        for phase in PHASES:
            number = next(signals)
            targets = chance.choice([(0,), (1,), (0, 1)][: 2 * reference.world_size - 1])
            hold = Hold(phase=phase.hold, number=chance.randint(*phase.numbers))
            # One rank tokenises for both, and which one is chance.
            ranks = reference.world_size if phase.name == "tokenising" else 1
            holds = tuple(dataclasses.replace(hold, rank=rank) for rank in range(ranks))
            start = _start_held(server, reference, run, holds)
            with explained(start, f"{number.name} to {targets} in {phase.name}, {hold}"):
                for rank in targets:
                    start.send(rank, number)
                start.go_on()
                start.wait_for_survivors()
                if phase.name == "tokenising":  # they have not met: the launcher ends the others
                    assert {start.codes[rank] for rank in targets} == {phase.code}
                    assert set(start.codes) <= {phase.code, -signal.SIGKILL}
                else:
                    assert start.codes == [phase.code] * reference.world_size
                if phase.code != ExitCode.DONE and 0 in targets:
                    assert f"Stopped by {number.name}; " in start.output()
                if phase.name == "an evaluation":  # it is broken off, and done again by the next
                    # Another rank may have asked about this batch already when its signal comes.
                    most = hold.number + (0 not in targets)
                    assert start.ranks[0].phases["evaluating"] <= most
                check_whole(run)
        assert_same_result(run, reference.run)
        next(signals)  # another one for each phase in the next round
    record_property("signals", len(PHASES) * rounds)
    record_property("starts", server.num_starts - starts)
    record_property("processes", server.num_processes - processes)


@pytest.mark.parametrize("name", ["full", "two"], ids=["one-process", "two-processes"])
def test_a_second_interrupt_leaves_at_once(
    references: dict[str, Reference],
    server: ForkServer,
    tmp_path: Path,
    chance: random.Random,
    record_property: Callable[[str, object], None],
    name: str,
) -> None:
    """Ctrl-C in the first step, and again within the save that it led to: 130, nothing damaged."""
    reference = references[name]
    run = tmp_path / "run"
    events_of_a_save = reference.phases[0]["saving"] // reference.num_steps  # or a few more
    holds = (
        Hold(phase="stepping", number=2),
        Hold(phase="saving", number=chance.randint(1, events_of_a_save)),
    )
    start = _start_held(server, reference, run, holds)
    with explained(start, holds):
        for second in (False, True):
            if second:
                assert start.wait_until_held(2), "the save was not reached"
                time.sleep(1.1)  # two within a second are one
            for rank in range(reference.world_size):
                start.send(rank, signal.SIGINT)
            sent_at = time.monotonic()
            start.go_on()
        assert start.wait() == [ExitCode.INTERRUPTED] * reference.world_size
        assert max(rank.ended_at for rank in start.ranks) - sent_at < 5
        check_whole(run)
    _finish(server, reference, run)
    record_property("signals", 2)


@pytest.mark.parametrize(
    ("name", "num_signals", "num_signals_torture"),
    [("full", 8, 150), ("two", 6, 100)],
    ids=["one-process", "two-processes"],
)
def test_signals_at_random_moments(
    references: dict[str, Reference],
    server: ForkServer,
    tmp_path: Path,
    chance: random.Random,
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
    name: str,
    num_signals: int,
    num_signals_torture: int,
) -> None:
    """Run after run is stopped and started again; what is done is equal to an undisturbed run."""
    reference = references[name]
    world_size = reference.world_size
    if request.config.getoption("--torture"):
        num_signals = num_signals_torture
    counts: Counter[str] = Counter(runs=1)
    run = tmp_path / "run-1"
    while counts["signals"] < num_signals:
        start = server.start(run, reference.recipe, world_size=world_size)
        number = chance.choice(SIGNALS)
        targets = chance.choice([(0,), (1,), (0, 1)][: 2 * world_size - 1])
        seconds = chance.uniform(0, 0.7 * reference.seconds * reference.part_left(run))
        with explained(start, f"{counts['signals']}: {number.name} to {targets} after {seconds} s"):
            start.wait_until_listening()
            start.run_for(seconds)
            counts["signals"] += not start.ended
            for rank in targets:
                start.send(rank, number)
            start.wait_for_survivors()
            codes = set(start.codes)
            whole = check_whole(run) or any(run.glob("class-*/checkpoint-*"))
            if not all(rank.met for rank in start.ranks) and world_size > 1:
                codes.discard(-signal.SIGKILL)
            assert len(codes) <= 1, codes
            assert codes <= {ExitCode.DONE, ExitCode.STOPPED if whole else ExitCode.INTERRUPTED}
            counts["starts"] += 1
            if codes == {ExitCode.DONE}:
                assert_same_result(run, reference.run)
                shutil.rmtree(run)
                counts["runs"] += 1
                run = tmp_path / f"run-{counts['runs']}"
    _finish(server, reference, run)
    for key, count in counts.items():
        record_property(key, count)
