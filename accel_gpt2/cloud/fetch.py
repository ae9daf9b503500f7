"""Bring a run here, from the machine that trains it or from where it outlives the machine.

Only what is missing is copied, so a fetch that broke off goes on where it was, and what is fetched
while the training goes on is a run as well. What comes with a manifest is held against it.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from accel_gpt2.classify.lock import check_free
from accel_gpt2.classify.spending import merged_ledgers, read_ledger, write_ledger
from accel_gpt2.cloud.engine import Engine, What
from accel_gpt2.cloud.ledger import Launch
from accel_gpt2.errors import UserError
from accel_gpt2.train.manifest import MANIFEST, is_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What a run directory has after a fetch: its size, and the models and checkpoints in it that
    are as their manifests say, by their paths there."""

    num_files: int
    num_bytes: int
    whole: tuple[str, ...]


def fetch_run(engine: Engine, launch: Launch, what: What = "all") -> Fetched:
    """Copy a launch's run into its run directory; what was spent here stays counted.

    A directory that is not as its manifest says is copied once more.

    Raises:
        UserError: when somebody is at work there, the run cannot be had, or it is damaged.
    """
    run = Path(launch.run_directory)
    check_free(run)
    known = read_ledger(run)
    try:
        engine.copy(launch, what)
        if damaged := _damaged(run):
            for directory in damaged:
                shutil.rmtree(directory)
            engine.copy(launch, what)
            damaged = _damaged(run)
    finally:
        if known:
            write_ledger(run, merged_ledgers(known, read_ledger(run)))
    if damaged:
        names = ", ".join(str(path.relative_to(run)) for path in damaged)
        raise UserError(
            f"{names} in {run} came twice, and not as its manifest says: it is damaged where it "
            "comes from, and what goes on from the run passes it over."
        )
    files = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
    whole = sorted(str(path.relative_to(run)) for path in _with_manifest(run))
    return Fetched(num_files=len(files), num_bytes=sum(files), whole=tuple(whole))


def _with_manifest(run: Path) -> list[Path]:
    found = [path.parent for path in run.rglob(MANIFEST)]
    return [path for path in found if not path.is_symlink()]


def _damaged(run: Path) -> list[Path]:
    return [path for path in _with_manifest(run) if not is_whole(path)]
