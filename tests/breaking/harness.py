"""Real runs in forked processes that are stopped or killed, and what must hold when they are."""

import contextlib
import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file

from accel_gpt2.report.read import read_run
from accel_gpt2.train.checkpoint import list_checkpoints
from accel_gpt2.train.manifest import verify

# Far above what a start takes on a busy machine; whoever is not done by then hangs.
START_SECONDS = 120.0

# When a process dies, the others end within a minute: by themselves once they have met. Before that
# they wait for it to come, and the launcher ends them (torchrun by SIGTERM, 30 s later by SIGKILL).
SURVIVOR_SECONDS = 60.0
_UNMET_SECONDS = 1.0  # what we give them, where torchrun gives them 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Stop a rank when a phase is entered for the `number`-th time in it, from 1."""

    phase: str
    number: int
    rank: int = 0


@dataclass(slots=True, kw_only=True)
class Rank:
    """One process of a start, as far as its events have told."""

    pid: int = 0
    held: list[Hold] = field(default_factory=list)
    stopped: bool = False
    listening: bool = False
    met: bool = False  # the process group has been built
    phases: dict[str, int] = field(default_factory=dict)
    code: int | None = None  # None while it runs
    ended_at: float = 0.0


class Start:
    """The processes of one start of a run."""

    def __init__(self, server: "ForkServer", output: str, world_size: int) -> None:
        self._server = server
        self._output = output
        self.started_at = time.monotonic()
        self.ranks = [Rank() for _ in range(world_size)]

    @property
    def ended(self) -> bool:
        """Whether no process is left."""
        return all(rank.code is not None for rank in self.ranks)

    @property
    def codes(self) -> list[int | None]:
        """The exit codes by rank, negative for a signal, None for a process that still runs."""
        return [rank.code for rank in self.ranks]

    def output(self) -> str:
        """What all processes have written, for a failure's message."""
        texts = []
        for rank in range(len(self.ranks)):
            path = Path(f"{self._output}-{rank}.txt")
            text = path.read_text(errors="replace") if path.exists() else ""
            texts.append(f"--- {path}\n{text[-6000:]}")
        return "\n".join(texts)

    def wait(self, seconds: float = START_SECONDS) -> list[int | None]:
        """The exit codes when all have ended; a process that has not by then is a failure."""
        if not self._server.pump(lambda: self.ended, seconds):
            codes = self.codes
            self.kill()
            raise AssertionError(f"not ended after {seconds:.0f} s: {codes}\n{self.output()}")
        return self.codes

    def wait_until_held(self, times: int = 1, seconds: float = START_SECONDS) -> bool:
        """Whether some rank stands still at its `times`-th hold; False when all ended before."""

        def there() -> bool:
            return any(rank.stopped and len(rank.held) >= times for rank in self.ranks)

        if not self._server.pump(lambda: there() or self.ended, seconds):
            self.kill()
            raise AssertionError(f"neither held nor ended after {seconds:.0f} s\n{self.output()}")
        return there()

    def wait_until_listening(self, seconds: float = START_SECONDS) -> None:
        """Until every rank answers signals."""
        done = self._server.pump(
            lambda: all(r.listening or r.code is not None for r in self.ranks), seconds
        )
        assert done, self.output()

    def run_for(self, seconds: float) -> None:
        """Let it run, or until it has ended."""
        self._server.pump(lambda: self.ended, seconds)

    def send(self, rank: int, number: signal.Signals) -> None:
        """A signal to one rank, if it is still there."""
        if self.ranks[rank].code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.ranks[rank].pid, number)

    def go_on(self) -> None:
        """Whoever is held goes on."""
        for rank, process in enumerate(self.ranks):
            if process.stopped:
                process.stopped = False
                self.send(rank, signal.SIGCONT)

    def wait_for_survivors(self) -> float:
        """Seconds until those that are left have ended by themselves after others were killed.

        Ranks that have not met yet are ended by us, as the launcher would; they count as 0.
        """
        survivors = [rank for rank in self.ranks if rank.code is None]
        killed_at = time.monotonic()
        if not self._server.pump(lambda: self.ended, _UNMET_SECONDS):
            unmet = [number for number, rank in enumerate(self.ranks) if not rank.met]
            for number in unmet:
                self.send(number, signal.SIGTERM)
            self._server.pump(
                lambda: all(self.ranks[x].code is not None for x in unmet), _UNMET_SECONDS
            )
            for number in unmet:
                self.send(number, signal.SIGKILL)
        self.wait(SURVIVOR_SECONDS)
        return max((rank.ended_at - killed_at for rank in survivors if rank.met), default=0.0)

    def kill(self) -> None:
        """SIGKILL to all that are left."""
        for rank in range(len(self.ranks)):
            self.send(rank, signal.SIGKILL)
        self._server.pump(lambda: self.ended, START_SECONDS)


class ForkServer:
    """`forkserver.py`, and the starts that it made."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._ids = itertools.count(1)
        self._ports = itertools.count(15000 + os.getpid() * 31 % 15000)
        self._starts: dict[int, Start] = {}
        self._by_pid: dict[int, tuple[Start, int]] = {}
        self._buffer = b""
        self._ready = False
        self.num_starts = 0
        self.num_processes = 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forkserver.py"))],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.pump(lambda: self._ready, 180), "the fork server did not start"

    def close(self) -> None:
        """End it and whatever it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def start(
        self,
        run: Path,
        recipe: Path,
        *,
        world_size: int = 1,
        holds: tuple[Hold, ...] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Start:
        """Start a run, or start it again."""
        number = next(self._ids)
        output = str(self._folder / f"{run.name}-start-{number}")
        start = Start(self, output, world_size)
        self._starts[number] = start
        self.num_starts += 1
        self.num_processes += world_size
        request = {
            "id": number,
            "recipe": str(recipe),
            "run": str(run),
            "output": output,
            "world_size": world_size,
            "port": self._free_port(),
            "environment": dict(environment),
            "holds": [{"rank": x.rank, "phase": x.phase, "number": x.number} for x in holds],
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        assert self.pump(lambda: all(rank.pid for rank in start.ranks), 30), "nothing was forked"
        return start

    def _free_port(self) -> int:
        # Below the range that the kernel hands out by itself, or a client's could be in the way.
        for port in self._ports:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", 15000 + port % 15000))
                return 15000 + port % 15000
        raise AssertionError("no port is free")

    def pump(self, done: Callable[[], bool], seconds: float) -> bool:
        """Take in events until `done()`; False when it did not come true in time."""
        deadline = time.monotonic() + seconds
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if not select.select([descriptor], [], [], left)[0]:
                continue
            read = os.read(descriptor, 65536)
            assert read, f"the fork server has ended with {self._process.wait()}"
            *lines, self._buffer = (self._buffer + read).split(b"\n")
            for line in lines:
                self._take_in(json.loads(line))
        return True

    def _take_in(self, event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            self._ready = True
            return
        if event["event"] == "forked":
            start = self._starts[event["id"]]
            start.ranks[event["rank"]].pid = event["pid"]
            self._by_pid[event["pid"]] = (start, event["rank"])
            return
        start, number = self._by_pid[event["pid"]]
        rank = start.ranks[number]
        match event["event"]:
            case "listening":
                rank.listening = True
            case "met":
                rank.met = True
            case "held":
                rank.held.append(Hold(phase=event["phase"], number=event["number"], rank=number))
            case "stopped":
                rank.stopped = True
            case "phases":
                rank.phases = event["phases"]
            case "ended":
                rank.code, rank.ended_at, rank.stopped = event["code"], time.monotonic(), False
                del self._by_pid[event["pid"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A run that nothing interrupted, and how to start another one like it."""

    name: str
    recipe: Path
    run: Path
    world_size: int
    seconds: float
    phases: tuple[dict[str, int], ...]  # by rank
    num_steps: int  # of all classes

    def part_left(self, run: Path) -> float:
        """How much of another run like this is still to train, from 0 to 1."""
        return 1 - sum(newest_steps(run).values()) / self.num_steps


def newest_steps(run: Path) -> dict[str, int]:
    """By class directory: the step of its newest checkpoint."""
    return {
        directory.name: int(checkpoints[0].name.split("-")[1])
        for directory in run.glob("class-*")
        if (checkpoints := list_checkpoints(directory))
    }


def check_whole(run: Path) -> bool:
    """What must hold in a run directory whenever no process is at work in it.

    Returns whether a save had been cut short: a staging folder was left.
    """
    for directory in run.glob("class-*"):
        for checkpoint in list_checkpoints(directory):
            verify(checkpoint)
        best = directory / "best"
        if best.is_symlink():
            assert re.fullmatch(r"checkpoint-\d+", os.readlink(best)), os.readlink(best)
            verify(best)
        if (directory / "final").exists():
            verify(directory / "final")
    staged = list(run.rglob(".staging-*"))
    for path in run.rglob("*.json"):
        if not any(part.startswith(".staging-") for part in path.relative_to(run).parts):
            json.loads(path.read_text(encoding="utf-8"))
    read_log(run)
    if (run / "recipe.yaml").exists():
        read_run(run)  # what a report of this moment would read
    return bool(staged)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl; only the last may be half a row, and then it has no line's end."""
    path = run / "log.jsonl"
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def _last_rows(run: Path, event: str, *keys: str) -> dict[tuple[int, int], tuple[Any, ...]]:
    return {
        (row["class_index"], row["step"]): tuple(row[key] for key in keys)
        for row in read_log(run)
        if row["event"] == event
    }


def assert_same_result(run: Path, reference: Path) -> None:
    """Bit for bit the tensors, calibration, losses and validation of an uninterrupted run."""
    check_whole(run)
    files = sorted(
        path.relative_to(reference) for path in reference.glob("class-*/final/*.safetensors")
    )
    assert len(files) >= 2, files
    for name in files:
        mine, theirs = load_file(run / name), load_file(reference / name)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            assert torch.equal(tensor, theirs[key]), f"{name}: {key}"
    calibrations = [json.loads((x / "calibration.json").read_text()) for x in (run, reference)]
    assert calibrations[0] == calibrations[1]
    for event, keys in (
        ("step", ("loss", "grad_norm", "learning_rate", "epoch", "tokens")),
        ("evaluate", ("validation_bits_per_token", "best")),
    ):
        mine_rows, their_rows = _last_rows(run, event, *keys), _last_rows(reference, event, *keys)
        assert mine_rows == their_rows, event
        assert mine_rows
    leftovers = list(run.glob("class-*/**/.staging-*"))
    assert not leftovers, f"{leftovers}, which may be as large as a checkpoint"


@contextlib.contextmanager
def explained(start: Start, seed: object) -> Iterator[None]:
    """Adds the processes' output and how to repeat it to a failure."""
    try:
        yield
    except Exception as error:
        error.add_note(f"seed {seed}, exit codes {start.codes}\n{start.output()}")
        raise
