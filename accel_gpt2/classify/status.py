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
    `updated` a local time with its offset (ISO 8601)."""

    index: int
    name: str
    state: State
    step: int
    total_steps: int
    best_loss_bits: float | None = None
    process: int | None = None
    updated: str = ""


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
        self._put(index, replace(before, state="training", step=step, process=process))
        begins = (before.state, before.process) != ("training", process)
        if begins or time.monotonic() - self._written >= _SECONDS_BETWEEN_STEPS:
            self.write()

    def best(self, index: int, loss_bits: float) -> None:
        """The best validation loss of a class so far, in its model's unit."""
        self._put(index, replace(self.classes[index], best_loss_bits=loss_bits))
        self.write()

    def ended(self, index: int, state: State) -> None:
        """A class is finished, or its training has ended in another way."""
        self._put(index, replace(self.classes[index], state=state))
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


def _classes(run_directory: Path) -> dict[str, Any]:
    """The classes' part of the file, or nothing."""
    try:
        content = json.loads((run_directory / STATUS_FILE).read_text(encoding="utf-8"))
        return {"classes": content["classes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
