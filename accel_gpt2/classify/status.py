"""`status.json`: where each class of a run is, and how its last trainer ended.

It is for whoever looks from outside: a person, a scheduler, the process that waits for the trainer.
What a run goes on from is in its checkpoints. Nothing here loads torch.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from accel_gpt2.durable import write_text
from accel_gpt2.errors import UserError

STATUS_FILE = "status.json"

# stopped: by a signal or a limit, with what was worth saving saved.
State = Literal["waiting", "training", "finished", "failed", "stopped"]

# Each is flushed to the disk, and steps may take milliseconds.
_SECONDS_BETWEEN_STEPS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassStatus:
    """Where one class is. `process` is the number of the one that trains or trained it last,
    `updated` a local time with its offset (ISO 8601), `message` why it failed."""

    index: int
    name: str
    state: State
    step: int
    total_steps: int
    best_loss_bits: float | None = None
    process: int | None = None
    updated: str = ""
    message: str = ""


class RunStatus:
    """The classes' part of a run's status.json, from the first `write` on; one process has it.

    What goes wrong with the file is no reason to stop a training.
    """

    def __init__(self, run_directory: Path, classes: Sequence[ClassStatus]) -> None:
        self._path = run_directory / STATUS_FILE
        self.classes = list(classes)
        self._written = 0.0

    def reached(self, index: int, step: int, *, process: int) -> None:
        """A class is being trained and is at this step."""
        before = self.classes[index]
        now = replace(before, state="training", step=step, process=process, message="")
        self._put(index, now)
        begins = (before.state, before.process) != ("training", process)
        if begins or time.monotonic() - self._written >= _SECONDS_BETWEEN_STEPS:
            self.write()

    def best(self, index: int, loss_bits: float) -> None:
        """The best validation loss of a class so far, in its model's unit."""
        self._put(index, replace(self.classes[index], best_loss_bits=loss_bits))
        self.write()

    def ended(self, index: int, state: State, message: str = "") -> None:
        """A class is finished, or its training has ended in another way, for this reason."""
        self._put(index, replace(self.classes[index], state=state, message=message))
        self.write()

    def _put(self, index: int, status: ClassStatus) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self.classes[index] = replace(status, updated=now)

    def write(self) -> None:
        """Put all of it on the disk."""
        self._written = time.monotonic()
        content = {"classes": [asdict(x) for x in self.classes]}
        with contextlib.suppress(UserError):
            write_text(self._path, json.dumps(content, ensure_ascii=False) + "\n")


def with_ending(run_directory: Path, *, exit_code: int, message: str, process: int) -> str:
    """What status.json is to hold when a trainer ends: that, and where the classes are."""
    ending = {"exit_code": exit_code, "message": message, "pid": process}
    return json.dumps({**ending, **_classes(run_directory)}, ensure_ascii=False) + "\n"


def read_ending(run_directory: Path) -> tuple[int, str] | None:
    """The exit code of the last trainer and its sentence; None while it has not said them.

    Raises:
        UserError: when the file is there and cannot be read.
    """
    path = run_directory / STATUS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "exit_code" not in content and "classes" in content:
            return None
        return int(content["exit_code"]), str(content["message"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}), so how the training ended is unknown; start it "
            "again to go on."
        ) from None


def read_classes(run_directory: Path) -> tuple[ClassStatus, ...]:
    """Where each class was when the file was written last; empty where nothing says it."""
    try:
        rows = _classes(run_directory).get("classes", [])
        return tuple(ClassStatus(**row) for row in rows)
    except TypeError:
        return ()


def where_they_are(classes: Sequence[ClassStatus], *, at_work: bool) -> str:
    """The classes in one line, as a person would say it.

    Args:
        at_work: whether a trainer lives; without one, what was being trained was killed.

    >>> def at(name, state, step): return ClassStatus(
    ...     index=0, name=name, state=state, step=step, total_steps=9)
    >>> where_they_are([at("a", "finished", 9), at("b", "finished", 9), at("c", "failed", 4)],
    ...                at_work=False)
    'a and b are trained; c failed at step 4 of 9.'
    >>> where_they_are([at("a", "training", 3), at("b", "waiting", 0)], at_work=False)
    'a was killed at step 3 of 9; b is not begun.'
    """
    trained = [x.name for x in classes if x.state == "finished"]
    waiting = [x.name for x in classes if x.state == "waiting" and x.step == 0]
    others = [
        f"{x.name} {_DOING[state_of(x, at_work=at_work)]} step {x.step} of {x.total_steps}"
        for x in classes
        if x.name not in {*trained, *waiting}
    ]
    said = [*_each(trained, "trained"), *others, *_each(waiting, "not begun")]
    return "; ".join(said) + "."


def _each(names: Sequence[str], how: str) -> list[str]:
    return [f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {how}"] if names else []


def state_of(status: ClassStatus, *, at_work: bool) -> State | Literal["killed"]:
    """The state of a class, where a trainer may have died without a word."""
    return "killed" if status.state == "training" and not at_work else status.state


_DOING = {
    "training": "is at",
    "waiting": "waits at",
    "stopped": "stopped at",
    "failed": "failed at",
    "killed": "was killed at",
}


def _classes(run_directory: Path) -> dict[str, Any]:
    """The classes' part of the file, or nothing."""
    try:
        content = json.loads((run_directory / STATUS_FILE).read_text(encoding="utf-8"))
        return {"classes": content["classes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
