"""Models of several classes at once, each in a process of its own: one per GPU, or several on one.

The process that holds the run directory starts a child for each class (`placed_child`), shows what
they do, passes signals on and keeps the records of the run. The children exchange nothing, so each
model is what it would be if the classes were trained one after another. They have a part in the
directory's lock and end when their parent does, saved: killing either loses no more than the steps
since the last checkpoint.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.classify.lock import held_descriptor
from accel_gpt2.classify.part_training import DirectoryRecords, announce
from accel_gpt2.classify.parts import Part
from accel_gpt2.classify.placed_child import Assignment
from accel_gpt2.classify.placed_progress import PlacedProgress
from accel_gpt2.classify.prepare import PreparedData
from accel_gpt2.classify.side_by_side import WORTHWHILE, Comparison
from accel_gpt2.classify.standing import Standing, part_identity, standing_of
from accel_gpt2.errors import ExitCode, StoppedEarly, UsageError, UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.processes import on_cpu
from accel_gpt2.train.stopping import StopRequest

_POLL_SECONDS = 0.2
_CPU = torch.device("cpu")
_STOPS = {ExitCode.LIMIT_REACHED, ExitCode.STOPPED, ExitCode.INTERRUPTED}

# What a launcher sets for the processes of one training; each child is a training of its own.
_OF_A_LAUNCH = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)


def is_placed(recipe: TrainRecipe) -> bool:
    """Whether each class is to be trained by a process of its own.

    Raises:
        UsageError: when there are several processes already, or children cannot be watched here.
    """
    if recipe.placement not in {"per-gpu", "concurrent"}:
        return False
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise UsageError(
            f"placement = {recipe.placement!r} starts a process for each class, and the launcher "
            f"started {world_size} for all of them: give `accelerate launch --num_processes 1`, or "
            "--placement sequential."
        )
    if sys.platform == "win32":
        raise UsageError(
            f"placement = {recipe.placement!r} needs Linux or macOS (WSL is enough); give "
            "--placement sequential."
        )
    return True


def devices_of(recipe: TrainRecipe, num_parts: int) -> list[str]:
    """What the children are placed on: GPUs, as CUDA_VISIBLE_DEVICES calls them.

    Without a GPU one part per core is trained at once, and at least two; "" stands for that.
    """
    if on_cpu():
        cores = os.cpu_count() or 1
        return [""] * (1 if recipe.placement == "concurrent" else min(num_parts, max(2, cores)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    profile = PROFILES.get(recipe.profile)
    return names if profile is None or profile.gpu is None else names[: profile.num_gpus]


def start_child(environment: Mapping[str, str], lock: int) -> "subprocess.Popen[bytes]":
    """`placed_child` in a process of its own, which has a part in the lock with this descriptor."""
    return subprocess.Popen(
        [sys.executable, "-m", "accel_gpt2.classify.placed_child"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(lock,),
        start_new_session=True,  # the terminal's Ctrl-C comes to us, and is passed on once
    )


@dataclass(slots=True, kw_only=True)
class _Child:
    """A process that trains a part, as far as its events have told."""

    part: Part
    device: str
    process: "subprocess.Popen[bytes]"
    describes: bool
    buffer: bytes = b""
    ending: dict[str, Any] | None = None
    told_to_stop: bool = False
    goes_on_later: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """Why the training of a part has neither come to its end nor been stopped."""

    part: Part
    code: int
    message: str
    traceback: str


@dataclass(slots=True, kw_only=True)
class _Ended:
    """How the children have ended so far."""

    finished: list[Part] = field(default_factory=list)
    stopped: list[dict[str, Any]] = field(default_factory=list)
    failures: list[_Failure] = field(default_factory=list)


class PlacedTraining:
    """The parts of a run that are left, trained by children.

    Args:
        steps: of each part.
        devices: what they are placed on, one each, or all of them where they are `concurrent`,
            which is given up where it is not faster; None for what `devices_of` finds.

    Attributes:
        recipe, plan: as `RunTraining` has them.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        run_directory: Path,
        data: PreparedData,
        parts: Sequence[Part],
        standings: Sequence[Standing],
        *,
        steps: Sequence[int],
        stop: StopRequest,
        progress: PlacedProgress,
        records: DirectoryRecords,
        spent_seconds: float,
        devices: Sequence[str] | None = None,
    ) -> None:
        self.recipe = recipe
        self.plan: dict[str, Any] = {}
        self._run_directory = run_directory
        self._data = data
        self._parts = parts
        self._standings = list(standings)
        self._steps = tuple(steps)
        self._stop = stop
        self._progress = progress
        self._records = records
        self._spent_seconds = spent_seconds
        self._queue = deque(part for part in parts if not standings[part.index].finished)
        self._devices = list(devices_of(recipe, len(parts)) if devices is None else devices)
        concurrent = recipe.placement == "concurrent"
        self._per_device = -(-len(parts) // len(self._devices)) if concurrent else 1
        self._children: list[_Child] = []
        self._selector = selectors.DefaultSelector()
        self._ended = _Ended()
        at_once = min(len(self._queue), self._per_device * len(self._devices))
        # More than one for each device only when it is known what these do alone.
        self._comparison = Comparison() if at_once > len(self._devices) else None
        self._threads = max(1, torch.get_num_threads() // max(1, at_once))

    def run(self) -> None:
        """Train them all; a failure of one leaves the others to their ends.

        Raises:
            StoppedEarly: by a signal or a limit, when all children have saved and left.
            UserError: naming the parts that failed, when the others have come to their ends.
        """
        for part in self._parts:
            announce(self._progress, part, self._standings[part.index], num_parts=len(self._parts))
        self._stop.pass_on = self._pass_on
        try:
            while self._children or self._may_start():
                self._fill()
                self._wait()
        finally:
            self._pass_on(True)  # where something else went wrong; none is left elsewhere
            while self._children:
                self._wait()
            self._stop.pass_on = lambda saves: None
            self._selector.close()
        self._raise_what_happened()

    def _may_start(self) -> bool:
        return bool(self._queue) and not self._stop.requested(_CPU)

    def _fill(self) -> None:
        """Start children where there is room."""
        while self._may_start():
            room = min(self._devices, key=self._load)
            if self._load(room) >= self._num_per_device():
                return
            self._start(self._queue.popleft(), room)

    def _load(self, device: str) -> float:
        """Parts that are trained on a device."""
        here = sum(child.device == device for child in self._children)
        return here / self._devices.count(device)

    def _num_per_device(self) -> int:
        comparing = self._comparison is not None and self._comparison.measures_alone
        return 1 if comparing else self._per_device

    def _start(self, part: Part, device: str) -> None:
        describes = not self.plan and not any(child.describes for child in self._children)
        standing = self._standings[part.index]
        assignment = Assignment(
            parent=os.getpid(),
            run_directory=str(self._run_directory),
            recipe=dataclasses.asdict(self.recipe),
            part=part.index,
            checkpoint=None if standing.checkpoint is None else str(standing.checkpoint),
            changed=dict(standing.changed),
            steps=self._steps,
            finished=tuple(
                x.finished or self._parts[i] in self._ended.finished
                for i, x in enumerate(self._standings)
            ),
            spent_seconds=self._spent_seconds,
            elapsed_seconds=self._stop.seconds,
            saved=self._stop.saved,
            describes=describes,
        )
        process = start_child(self._environment(device), held_descriptor(self._run_directory))
        child = _Child(part=part, device=device, process=process, describes=describes)
        self._children.append(child)
        assert process.stdin is not None
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, child)
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and will say why
            process.stdin.write(assignment.to_json().encode())
            process.stdin.close()
        if self._comparison is not None:
            self._comparison.started(part.index)

    def _environment(self, device: str) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if k not in _OF_A_LAUNCH}
        environment["OMP_NUM_THREADS"] = str(self._threads)
        if device:
            environment["CUDA_VISIBLE_DEVICES"] = device
        return environment

    def _wait(self) -> None:
        """Take in what children say until one of them ends, or for a moment."""
        for key, _ in self._selector.select(_POLL_SECONDS):
            child: _Child = key.data
            read = os.read(key.fd, 2**16)
            if not read:
                self._selector.unregister(key.fileobj)
                self._take_leave(child)
                continue
            *lines, child.buffer = (child.buffer + read).split(b"\n")
            for line in lines:
                self._take_in(child, json.loads(line))

    def _take_in(self, child: _Child, event: dict[str, Any]) -> None:
        self._progress.show(child.part.index)
        match event.pop("event"):
            case "phase":
                self._progress.start(**event)
            case "update":
                self._progress.update(**event)
            case "say":
                self._progress.say(event["line"])
            case "row":
                self._records.note(event["row"], process=child.process.pid)
                self._compare(child.part, event["row"])
            case "saved":
                self._stop.saved = True
                self._records.saved(child.part)
            case "planned":
                self._planned(event["plan"], event["micro_batch_tokens"])
            case "ending":
                child.ending = event

    def _planned(self, plan: dict[str, Any] | None, micro_batch_tokens: int) -> None:
        smaller = min(self.recipe.micro_batch_tokens, micro_batch_tokens)
        self.recipe = dataclasses.replace(self.recipe, micro_batch_tokens=smaller)
        self.plan = {**(plan or self.plan), "micro_batch_tokens": smaller}
        if "model" in self.plan:
            self._records.planned(self.recipe, self.plan)

    def _compare(self, part: Part, row: dict[str, Any]) -> None:
        """Give up more than one child for each device where it is not worthwhile."""
        if self._comparison is None or row["event"] != "step":
            return
        self._comparison.step(part.index, row["tokens_per_second"])
        speedup = self._comparison.speedup
        if speedup is None:
            return
        self._comparison = None
        said = f"Side by side, training is {speedup:.2f} times as fast as one after another"
        if speedup >= WORTHWHILE:
            self._progress.say(f"{said}: it goes on so.")
            return
        self._progress.say(
            f"{said}, less than {WORTHWHILE:g}: the classes are trained one after another from "
            "here on."
        )
        self._per_device = 1
        room = Counter(self._devices)
        for child in self._children:
            room[child.device] -= 1
            if room[child.device] < 0:
                child.goes_on_later = True
                _tell_to_stop(child)

    def _take_leave(self, child: _Child) -> None:
        """A child has ended: its part is finished, stopped, failed, or goes on later."""
        returncode = child.process.wait()
        assert child.process.stdout is not None
        child.process.stdout.close()
        self._children.remove(child)
        self._progress.end(child.part.index)
        self._comparison = None  # of what was still being compared, the situation is gone
        ending = child.ending or _without_a_word(child, returncode)
        status = self._records.status
        if ending["code"] == ExitCode.DONE:
            self._ended.finished.append(child.part)
        elif ending["code"] in _STOPS and child.goes_on_later:
            identity = part_identity(self.recipe, self._data, child.part)
            self._standings[child.part.index] = standing_of(child.part, identity, self.recipe)
            self._queue.appendleft(child.part)
            status.ended(child.part.index, "waiting")
        elif ending["code"] in _STOPS:
            self._ended.stopped.append(ending)
            status.ended(child.part.index, "stopped")
        else:
            self._ended.failures.append(_Failure(part=child.part, **ending))
            status.ended(child.part.index, "failed", ending["message"])
            others = " The other classes go on." if self._children or self._queue else ""
            self._progress.say(f"{child.part.name} failed: {ending['message']}{others}")

    def _pass_on(self, saves: bool) -> None:
        """All children stop, saved, or at once; called from a signal handler."""
        for child in self._children:
            if saves:
                _tell_to_stop(child)
            else:
                child.process.kill()

    def _raise_what_happened(self) -> None:
        ended = self._ended
        if ended.failures:
            raise _failed(ended.failures, ended.finished)
        if not ended.stopped and not self._queue:
            return
        if self._stop.requested(_CPU):
            raise self._stop.error()
        ending = ended.stopped[0]  # by a limit that children keep time for, or one child's signal
        raise StoppedEarly(ending["message"], ExitCode(ending["code"]))


def _tell_to_stop(child: _Child) -> None:
    if not child.told_to_stop:
        child.told_to_stop = True
        child.process.terminate()


def _without_a_word(child: _Child, returncode: int) -> dict[str, Any]:
    """The ending of a child that has told none."""
    if returncode == -signal.SIGTERM and child.told_to_stop:  # before it began
        return {"code": int(ExitCode.STOPPED), "message": "", "traceback": ""}
    if returncode < 0:
        message = (
            "its process was killed before it could say why, perhaps because memory ran out "
            "(`dmesg` tells)."
        )
    else:
        message = f"its process ended with exit code {returncode}; what it said is above."
    return {"code": int(ExitCode.FAILED), "message": message, "traceback": ""}


def _failed(failures: Sequence[_Failure], finished: Sequence[Part]) -> UserError:
    """One error of all that failed: which, why, what is there, and how to go on."""
    said = [f"{failure.part.name} failed: {failure.message}" for failure in failures]
    trained = " and ".join(part.name for part in finished)
    are = "is" if len(finished) == 1 else "are"
    rest = f"{trained} {are} trained; start" if finished else "Start"
    said.append(f"{rest} again to go on with {' and '.join(x.part.name for x in failures)}.")
    error = UserError(" ".join(said))
    error.exit_code = ExitCode(failures[0].code)
    for failure in failures:
        if failure.traceback:
            error.add_note(failure.traceback)
    return error
