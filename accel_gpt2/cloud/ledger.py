"""What was started on rented machines: one small file each, written before anything is asked for.

So that whatever dies half-way, `accel-gpt2 cloud reap` knows what may be running and costing money.
"""

import dataclasses
import datetime
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt
from pydantic import TypeAdapter

from accel_gpt2.catalog.engines import EngineName
from accel_gpt2.classify.spending import note_launch, read_ledger
from accel_gpt2.durable import make_directory, write_failure, write_json
from accel_gpt2.errors import UsageError, UserError, nearest
from accel_gpt2.render.cloud_job import ENDING
from accel_gpt2.train.manifest import read_json

# Of every name: what on a provider's list of machines is ours.
NAME_PREFIX = "accel-gpt2-"

# submitting: the engine was asked and has not answered, so a machine may be there or not.
LaunchState = Literal["submitting", "running", "ended"]

_RECORD = "launch.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch. `began` and `deadline` are UTC times (ISO 8601); after the latter its budget is
    spent, and nothing of it should be running. `run_directory` is here, an absolute path."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True, "extra": "forbid"}

    name: str
    engine: EngineName
    provider: str
    gpu: str
    num_gpus: int
    usd_per_hour: Annotated[float, Gt(0)]
    budget_usd: Annotated[float, Gt(0)]
    began: str
    deadline: str
    run_directory: str
    bucket: str | None
    spot: bool
    state: LaunchState
    exit_code: int | None = None

    @property
    def is_overdue(self) -> bool:
        """Whether it has not ended though its budget is spent."""
        over = datetime.datetime.now(datetime.UTC) > datetime.datetime.fromisoformat(self.deadline)
        return self.state != "ended" and over

    def is_over(self, standing: str) -> bool:
        """Whether nothing of it is billed any more: SkyPilot's own machines stay after their job
        until they are taken down."""
        if self.engine == "skypilot" and not self.spot:
            return standing == "gone"
        return standing not in {"starting", "running", "unknown"}

    def in_state(self, state: LaunchState, exit_code: int | None = None) -> "Launch":
        """The same launch, later."""
        return dataclasses.replace(self, state=state, exit_code=exit_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ending:
    """What a machine's run script leaves in the run directory, ENDING, when it ends."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True, "extra": "forbid"}

    launch: str
    exit_code: int


_READER = TypeAdapter(Launch)
_ENDING_READER = TypeAdapter(_Ending)


def launches_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """`accel-gpt2/cloud` in the user's folder for state that programs keep; it need not exist."""
    state = environment.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "accel-gpt2" / "cloud"


def launch_directory(name: str) -> Path:
    """Where a launch has its record, its files and what is uploaded."""
    return launches_directory() / name


def write_launch(launch: Launch) -> None:
    """Put a launch's record on the disk.

    Raises:
        UserError: when it cannot be written, and then nothing may be started.
    """
    directory = launch_directory(launch.name)
    try:
        make_directory(directory)
    except OSError as error:
        raise write_failure(directory, error) from None
    write_json(directory / _RECORD, asdict(launch))


def read_launch(name: str) -> Launch:
    """The launch of this name.

    Raises:
        UsageError: when there is none.
        UserError: when its record is damaged.
    """
    known = [launch.name for launch in read_launches()]
    if name not in known:
        there = f" There are {', '.join(known[-5:])}." if known else " Nothing was launched yet."
        raise UsageError(f"There is no launch {name!r}.{nearest(name, known)}{there}")
    return _read(launch_directory(name) / _RECORD)


def find_launch(run: str) -> Launch:
    """The launch of this name, or else the newest one of this run directory.

    Raises:
        UsageError: when there is neither.
        UserError: when a record is damaged.
    """
    directory = os.path.abspath(run)
    of_run = [launch for launch in read_launches() if launch.run_directory == directory]
    return of_run[-1] if of_run else read_launch(run)


def read_launches() -> list[Launch]:
    """All launches, oldest first.

    Raises:
        UserError: when a record is damaged: what it was may still be running.
    """
    launches = [_read(path) for path in launches_directory().glob(f"*/{_RECORD}")]
    return sorted(launches, key=lambda launch: launch.began)


def _read(path: Path) -> Launch:
    try:
        return read_json(_READER, path)
    except UserError as error:
        raise UserError(
            f"{error} Look at the provider's page for a machine named {path.parent.name}, then "
            f"remove {path.parent}."
        ) from None


def exit_code_of(launch: Launch) -> int | None:
    """How a training ended on its machine, by what was fetched; None where it did not come to it.

    Raises:
        UserError: when what says it is damaged.
    """
    path = Path(launch.run_directory) / ENDING
    if not path.exists():
        return None
    ending = read_json(_ENDING_READER, path)
    return ending.exit_code if ending.launch == launch.name else None


def note_spent(launch: Launch) -> None:
    """Count the time since a launch as spent, where no machine of it has said what it cost.

    Setting it up may have failed, or nothing came back from it; it was paid for all the same. After
    its deadline no machine is left.
    """
    run = Path(launch.run_directory)
    rows = read_ledger(run)
    if any(row.launch == launch.name and row.billed_since is not None for row in rows):
        return
    began, deadline = map(datetime.datetime.fromisoformat, (launch.began, launch.deadline))
    until = min(datetime.datetime.now(datetime.UTC), deadline)
    seconds = max(0.0, (until - began).total_seconds())
    note_launch(run, launch.name, seconds=seconds, usd_per_hour=launch.usd_per_hour)
