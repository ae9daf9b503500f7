"""The run directory as the command line sees it: its name, its recipe, and who is at work in it."""

import os
import re
from pathlib import Path

from accel_gpt2.durable import make_directory, write_text
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import WARNED_FIELDS, TrainRecipe, result_differences
from accel_gpt2.recipe.layers import read_layer, to_yaml
from accel_gpt2.recipe.resolving import resolve

RECIPE_FILE = "recipe.yaml"


def default_run_directory(recipe: TrainRecipe) -> Path:
    """`runs/<dataset>-<model>[-lora|-qlora]`, in characters that every file system takes.

    >>> default_run_directory(TrainRecipe(dataset="fancyzhx/ag_news", finetuning="lora"))
    PosixPath('runs/fancyzhx-ag_news-gpt2-lora')
    >>> default_run_directory(TrainRecipe(dataset="/data/My texts.csv", model="./my-model/"))
    PosixPath('runs/My-texts-my-model')
    """
    adapter = "" if recipe.finetuning == "full" else f"-{recipe.finetuning}"
    return Path("runs") / f"{_slug(recipe.dataset)}-{_slug(recipe.model)}{adapter}"


def _slug(name: str) -> str:
    if name.startswith((".", "/", "~")):  # a path: its last part says enough
        name = Path(name).stem or Path(name).resolve().name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "unnamed"


def prepare_run_directory(run_directory: Path, recipe: TrainRecipe, *, resume: str) -> None:
    """Create the directory with its `recipe.yaml`, or check that a run may go on in it.

    Raises:
        UserError: when the path is taken by something else, when a trainer is at work in it, or
            when the run in it was started with other values that change the result.
    """
    from accel_gpt2.classify.aside import make_way

    check_run_directory(run_directory, recipe, resume=resume)
    make_way(run_directory, resume=resume)
    try:
        make_directory(run_directory)
    except OSError as error:
        raise UserError(
            f"The run directory {run_directory} cannot be written: {error.strerror}. Give another "
            "--output-dir."
        ) from None
    write_text(run_directory / RECIPE_FILE, to_yaml(recipe))


def check_run_directory(
    run_directory: Path, recipe: TrainRecipe, *, resume: str, heir_of: int | None = None
) -> None:
    """The checks of `prepare_run_directory`, without writing anything.

    Args:
        heir_of: the process that started this one, and prepared the directory for it.
    """
    # Here, because a plan asks for a directory's name and for nothing else.
    from accel_gpt2.classify.aside import is_trained
    from accel_gpt2.classify.lock import LOCK_FILE, OWNER_FILE, check_free
    from accel_gpt2.classify.spending import SPENT
    from accel_gpt2.classify.status import STATUS_FILE

    # os.path, because to pathlib a name that is too long is an error and not an answer.
    if os.path.exists(run_directory) and not os.path.isdir(run_directory):
        raise UsageError(f"{run_directory} is a file; give another --output-dir.")
    check_free(run_directory, heir_of=heir_of)
    recipe_path = run_directory / RECIPE_FILE
    if not os.path.exists(recipe_path):
        before_the_recipe = {LOCK_FILE, OWNER_FILE, STATUS_FILE, SPENT}  # what a start puts there
        if os.path.isdir(run_directory) and any(
            path.name not in before_the_recipe for path in run_directory.iterdir()
        ):
            raise UsageError(
                f"{run_directory} holds files and no {RECIPE_FILE}: it is not a run directory. "
                "Give another --output-dir."
            )
        return
    if resume == "never" or not any(run_directory.glob("class-*")):  # or nothing to go on from
        return
    old = resolve([read_layer(recipe_path)]).recipe
    differences = result_differences(old, recipe)
    # Some values may change on the way, of which the training warns; at the end nothing may.
    if set(differences) - WARNED_FIELDS or (differences and is_trained(run_directory)):
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
    if not os.path.isfile(run_directory / RECIPE_FILE):
        what = "is not a run directory" if os.path.exists(run_directory) else "does not exist"
        runs = sorted(path.parent for path in run_directory.parent.glob(f"*/{RECIPE_FILE}"))
        there = f" There are {', '.join(map(str, runs[:5]))}." if runs else ""
        raise UsageError(f"{run_directory} {what} (no {RECIPE_FILE} in it).{there}")
