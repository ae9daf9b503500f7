"""The run directory as the command line sees it: its name, its recipe, and who is at work in it."""

import json
import os
import re
from pathlib import Path

from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import TrainRecipe, read_layer, resolve, result_differences, to_yaml

RECIPE_FILE = "recipe.yaml"
STATUS_FILE = "status.json"
TRAINER_FILE = "trainer.pid"


def default_run_directory(recipe: TrainRecipe) -> Path:
    """`runs/<dataset>-<model>[-lora]`, in characters that every file system takes.

    >>> default_run_directory(TrainRecipe(dataset="fancyzhx/ag_news", finetuning="lora"))
    PosixPath('runs/fancyzhx-ag_news-gpt2-lora')
    >>> default_run_directory(TrainRecipe(dataset="/data/My texts.csv", model="./my-model/"))
    PosixPath('runs/My-texts-my-model')
    """
    lora = "-lora" if recipe.finetuning == "lora" else ""
    return Path("runs") / f"{_slug(recipe.dataset)}-{_slug(recipe.model)}{lora}"


def _slug(name: str) -> str:
    if name.startswith((".", "/", "~")):  # a path: its last part says enough
        name = Path(name).stem or Path(name).resolve().name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"


def prepare_run_directory(run_directory: Path, recipe: TrainRecipe, *, resume: str) -> None:
    """Create the directory with its `recipe.yaml`, or check that a run may go on in it.

    Raises:
        UserError: when the path is taken by something else, when a trainer is at work in it, or
            when the run in it was started with other values that change the result.
    """
    check_run_directory(run_directory, recipe, resume=resume)
    try:
        run_directory.mkdir(parents=True, exist_ok=True)
        write_atomically(run_directory / RECIPE_FILE, to_yaml(recipe))
    except OSError as error:
        raise UserError(
            f"The run directory {run_directory} cannot be written: {error.strerror}. Give another "
            "--output-dir."
        ) from None


def check_run_directory(run_directory: Path, recipe: TrainRecipe, *, resume: str) -> None:
    """The checks of `prepare_run_directory`, without writing anything."""
    if run_directory.exists() and not run_directory.is_dir():
        raise UsageError(f"{run_directory} is a file; give another --output-dir.")
    pid = running_trainer(run_directory)
    if pid is not None and pid != os.getpid():
        raise UserError(
            f"Process {pid} is training in {run_directory}; wait for it, stop it with "
            f"`kill {pid}` (it saves first), or give another --output-dir."
        )
    recipe_path = run_directory / RECIPE_FILE
    if not recipe_path.exists():
        if run_directory.is_dir() and any(run_directory.iterdir()):
            raise UsageError(
                f"{run_directory} holds files and no {RECIPE_FILE}: it is not a run directory. "
                "Give another --output-dir."
            )
        return
    if resume == "never" or not any(run_directory.glob("class-*")):  # or nothing to go on from
        return
    old = resolve([read_layer(recipe_path)]).recipe
    differences = result_differences(old, recipe)
    if differences:
        listed = "\n".join(
            f"  {key}: {before!r} there, {now!r} here" for key, (before, now) in differences.items()
        )
        raise UsageError(
            f"The run in {run_directory} was started with another recipe:\n{listed}\n"
            f"Give --recipe {recipe_path} --output-dir {run_directory} to go on with it, "
            "--resume never to start it anew, or another --output-dir."
        )


def require_run(run_directory: Path) -> None:
    """Check that a path is a run directory.

    Raises:
        UsageError: when it is not.
    """
    if not (run_directory / RECIPE_FILE).is_file():
        what = "is not a run directory" if run_directory.exists() else "does not exist"
        runs = sorted(path.parent for path in run_directory.parent.glob(f"*/{RECIPE_FILE}"))
        there = f" There are {', '.join(map(str, runs[:5]))}." if runs else ""
        raise UsageError(f"{run_directory} {what} (no {RECIPE_FILE} in it).{there}")


def running_trainer(run_directory: Path) -> int | None:
    """The process that is training in a run directory on this machine, or None."""
    import psutil

    try:
        record = json.loads((run_directory / TRAINER_FILE).read_text(encoding="utf-8"))
        process = psutil.Process(int(record["pid"]))
        # A number that was given to another process since then has another time of birth.
        same = abs(process.create_time() - float(record["create_time"])) < 1.0
        alive = same and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None
    return process.pid if alive else None


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the whole new one."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)
