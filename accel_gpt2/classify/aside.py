"""The earlier run in a run directory, without loading torch: is it finished, and out of the way.

`--resume never` keeps it: all of it moves to `before-<time>/`, where it can be evaluated as before.
"""

import contextlib
import itertools
import json
import shutil
import time
from pathlib import Path

from accel_gpt2.durable import STAGING_PREFIX, flush_directory, writing

_BEFORE = "before-"
_STAGING = f"{STAGING_PREFIX}{_BEFORE}"
_RECIPE = "recipe.yaml"

# Of the process that is at work now: its lock, and who it is.
_OF_THIS_START = {"run.lock", "owner.json"}

# What only a run that has begun leaves.
_RESULTS = ("class-*", "plan.json", "log.jsonl", "calibration.json", "evaluation*")


def make_way(run_directory: Path, *, resume: str) -> None:
    """What a start does before it writes anything: `--resume never` moves the run that is there.

    A move that was cut off is finished, whatever `resume` says: half a run is nothing to go on
    from.
    """
    if resume == "never" or _interrupted(run_directory):
        move_aside(run_directory)


def move_aside(run_directory: Path) -> Path | None:
    """Move the run that is there into `before-<time>/` and return that, or None without a run.

    `recipe.yaml` is copied, since a directory without one is no run directory.

    Raises:
        UserError: when it cannot be moved; called again, this goes on where it was.
    """
    begun = any(path for pattern in _RESULTS for path in run_directory.glob(pattern))
    if not begun and not _interrupted(run_directory):
        return None
    staging = _interrupted(run_directory) or _free_name(run_directory)
    with writing(staging):
        staging.mkdir(exist_ok=True)
        for path in sorted(run_directory.iterdir()):
            if path.name == _RECIPE:
                shutil.copy2(path, staging / _RECIPE)
            elif path.name not in _OF_THIS_START and not path.name.startswith((".", _BEFORE)):
                path.replace(staging / path.name)
        flush_directory(staging)
        aside = staging.with_name(staging.name.removeprefix(STAGING_PREFIX))
        staging.replace(aside)
        flush_directory(run_directory)
    return aside


def _interrupted(run_directory: Path) -> Path | None:
    return next(run_directory.glob(f"{_STAGING}*"), None)


def _free_name(run_directory: Path) -> Path:
    """A staging name whose own name nothing has, also with two runs in the same second."""
    name = time.strftime(f"{_BEFORE}%Y-%m-%d-%H%M%S")
    for number in itertools.count(1):
        free = name if number == 1 else f"{name}-{number}"
        if not (run_directory / free).exists():
            return run_directory / f"{STAGING_PREFIX}{free}"
    raise AssertionError("count() has no end")


def is_trained(run_directory: Path) -> bool:
    """Whether all final models of the run are there."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        plan = json.loads((run_directory / "plan.json").read_text(encoding="utf-8"))
        finals = list(run_directory.glob("class-*/final/manifest.json"))
        return 0 < int(plan["num_models"]) <= len(finals)
    return False
