"""One part of a run, trained by a process of its own: `python -m accel_gpt2.classify.placed_child`.

Its assignment comes as one line of JSON on stdin; what it does goes out as lines of JSON on stdout,
to `placed`, which started it and holds the run directory. Checkpoints, `final/` and the rows of
log.jsonl it writes itself, so nothing of them is lost with whoever listens.
"""

import contextlib
import dataclasses
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_gpt2.classify.part_training import RunTraining
from accel_gpt2.classify.parts import Part
from accel_gpt2.classify.prepare import prepare_data
from accel_gpt2.classify.run import LOG
from accel_gpt2.classify.standing import Standing
from accel_gpt2.failures import ending, is_expected
from accel_gpt2.parent import stop_with_parent
from accel_gpt2.recipe import Layer, TrainRecipe
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train.processes import build_accelerator, start_trackers
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.run_log import append_json_line
from accel_gpt2.train.stopping import StopRequest, limits_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a child has to train; `steps` and `finished` are of all parts.

    `elapsed_seconds` of this start of the run are over, and `spent_seconds` went into earlier ones.
    `describes` says whether it is this child that tells what the run's plan is.
    """

    parent: int
    run_directory: str
    recipe: dict[str, Any]
    part: int
    checkpoint: str | None
    changed: dict[str, tuple[object, object]]
    steps: tuple[int, ...]
    finished: tuple[bool, ...]
    spent_seconds: float
    elapsed_seconds: float
    saved: bool
    describes: bool

    def to_json(self) -> str:
        """As one line."""
        return json.dumps(dataclasses.asdict(self)) + "\n"


class _Channel:
    """Events to the parent; when it has died nobody listens, and the child still has to save."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, event: str, **values: object) -> None:
        """One line; `values` are JSON, but for NaN and infinities, which Python reads back."""
        line = json.dumps({"event": event, **values}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):
            while line:
                line = line[os.write(self._descriptor, line) :]


class _Progress(TrainProgress):
    """Shown by the parent."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__(shown=False, quiet=True)
        self._channel = channel

    def start(self, description: str, total: int, completed: int = 0) -> None:
        self._channel.send("phase", description=description, total=total, completed=completed)

    def update(self, description: str, completed: int, total: int, facts: str) -> None:
        self._channel.send(
            "update", description=description, completed=completed, total=total, facts=facts
        )

    def say(self, line: str) -> None:
        self._channel.send("say", line=line)


class _Records:
    """`RunRecords` that the parent keeps, but for log.jsonl."""

    def __init__(self, channel: _Channel, run_directory: Path, *, describes: bool) -> None:
        self._channel = channel
        self._log = run_directory / LOG
        self._describes = describes

    def log(self, row: dict[str, Any]) -> None:
        append_json_line(self._log, row, shared=True)
        self._channel.send("row", row=row)

    def planned(self, recipe: TrainRecipe, plan: dict[str, Any]) -> None:
        self._channel.send(
            "planned",
            plan=plan if self._describes else None,
            micro_batch_tokens=recipe.micro_batch_tokens,
        )

    def saved(self, part: Part) -> None:
        self._channel.send("saved")

    def failed(self, part: Part, message: str) -> None:
        raise AssertionError("a child has one part, and fails with it")


def main() -> None:
    """Train what stdin says, and tell how it ended."""
    stop_with_parent()
    channel = _Channel(os.dup(1))
    os.dup2(2, 1)  # what a library prints is no event
    assignment = Assignment(**json.loads(sys.stdin.readline()))
    if os.getppid() != assignment.parent:  # it died before the kernel was asked to tell
        return
    try:
        _train(assignment, channel)
    except BaseException as error:
        code, message = ending(error)
        trace = "" if is_expected(error) else traceback.format_exc()
        channel.send("ending", code=code, message=message, traceback=trace)
        sys.exit(code)
    channel.send("ending", code=0, message="", traceback="")


def _train(assignment: Assignment, channel: _Channel) -> None:
    run_directory = Path(assignment.run_directory)
    recipe = resolve([Layer(origin="the run", values=assignment.recipe)]).recipe
    limits = [  # which began with the run's start, not with this process
        dataclasses.replace(limit, seconds=limit.seconds - assignment.elapsed_seconds)
        for limit in limits_of(recipe, assignment.spent_seconds)
    ]
    standings = [Standing(finished=finished, checkpoint=None) for finished in assignment.finished]
    standings[assignment.part] = Standing(
        finished=False,
        checkpoint=None if assignment.checkpoint is None else Path(assignment.checkpoint),
        changed=assignment.changed,
    )
    with StopRequest(limits, saved=assignment.saved) as stop:
        stop.announce = lambda line: None  # the parent has said it
        data = prepare_data(recipe, progress=False)
        stop.preparing = False
        accelerator = build_accelerator(recipe, run_directory)
        start_trackers(accelerator)
        training = RunTraining(
            recipe,
            run_directory,
            data,
            standings,
            accelerator,
            stop=stop,
            progress=_Progress(channel),
            spent_seconds=assignment.spent_seconds + assignment.elapsed_seconds,
            records=_Records(channel, run_directory, describes=assignment.describes),
            steps=assignment.steps,
        )
        if not assignment.describes:
            training.plan = {"micro_batch_tokens": recipe.micro_batch_tokens}
        try:
            training.train(training.parts[assignment.part])
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()


if __name__ == "__main__":
    main()
