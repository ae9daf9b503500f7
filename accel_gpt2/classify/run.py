"""A run directory: its names, and what is read back from it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_gpt2.durable import write_json, write_text
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import Layer, TrainRecipe, read_layer, resolve, to_yaml
from accel_gpt2.train.checkpoint import MANIFEST

CALIBRATION = "calibration.json"  # in the run directory, written when all classes are trained
TRAINING_RECORD = "training.json"  # in `final/`: the best step, tokens, seconds, identity
LOG = "log.jsonl"
SPENT = "spent.json"  # the seconds of all starts, for the budget
PREPARE_LOCK = "prepare.lock"  # in the cache: who reads and tokenises, the others wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run directory that has been started: its recipe and its classes."""

    directory: Path
    recipe: TrainRecipe
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]  # training documents
    data_fingerprint: str

    def class_directory(self, index: int) -> Path:
        """Where one class's checkpoints and final model are."""
        return class_directory(self.directory, index, self.class_names[index])

    def final(self, index: int) -> Path:
        """The trained model of one class, loadable by transformers or peft."""
        return self.class_directory(index) / "final"


def class_directory(run_directory: Path, index: int, name: str) -> Path:
    """`class-<index>-<slug>`: readable, and safe on any file system.

    >>> class_directory(Path("runs/a"), 3, "Sci/Tech").name
    'class-3-sci-tech'
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "unnamed"
    return run_directory / f"class-{index}-{slug}"


def open_run(directory: Path, *, finished: bool = True) -> Run:
    """Read a run directory.

    Args:
        finished: whether every class must be trained.

    Raises:
        UserError: when it is no run directory, or a class is not trained yet.
    """
    recipe_path, plan_path = directory / "recipe.yaml", directory / "plan.json"
    if not recipe_path.is_file() or not plan_path.is_file():
        raise UserError(
            f"{directory} is not a run directory: it has no "
            f"{'plan.json' if recipe_path.is_file() else 'recipe.yaml'}. Give the folder that "
            "`accel-gpt2 train` wrote, for instance runs/demo."
        )
    # The file holds every key, so nothing of today's defaults gets in.
    layer = read_layer(recipe_path)
    recipe = resolve([Layer(origin=layer.origin, values=layer.values)]).recipe
    try:
        plan: dict[str, Any] = json.loads(plan_path.read_text(encoding="utf-8"))
        run = Run(
            directory=directory,
            recipe=recipe,
            class_names=tuple(plan["class_names"]),
            class_counts=tuple(plan["class_counts"]),
            data_fingerprint=plan["data_fingerprint"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{plan_path} cannot be read ({type(error).__name__}: {error}). {_go_on(directory)}"
        ) from None
    missing = [
        name
        for index, name in enumerate(run.class_names)
        if not (run.final(index) / MANIFEST).is_file()
    ]
    if not missing and not (directory / CALIBRATION).is_file():
        missing = [CALIBRATION]
    if finished and missing:
        raise UserError(
            f"{directory} is not trained to the end: {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. {_go_on(directory)}"
        )
    return run


def _go_on(directory: Path) -> str:
    recipe_path = directory / "recipe.yaml"
    return f"Go on with `accel-gpt2 train --recipe {recipe_path} --output-dir {directory}`."


def holds_work(run_directory: Path) -> bool:
    """Whether a start would go on from something: a checkpoint or a finished class."""
    return any(run_directory.glob("class-*/checkpoint-*")) or any(
        run_directory.glob("class-*/final")
    )


def write_recipe(run_directory: Path, recipe: TrainRecipe) -> None:
    """`recipe.yaml`, whole or not at all."""
    write_text(run_directory / "recipe.yaml", to_yaml(recipe))


def read_training_record(final: Path) -> dict[str, Any]:
    """What is known of a finished class's training."""
    record: dict[str, Any] = json.loads((final / TRAINING_RECORD).read_text(encoding="utf-8"))
    return record


def read_spent_seconds(run_directory: Path) -> float:
    """How long earlier starts of a run took; 0 for none.

    Raises:
        UserError: when the record is damaged: without it a budget would be spent twice.
    """
    path = run_directory / SPENT
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
    except FileNotFoundError:
        return 0.0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}); write the seconds that the "
            'run took so far into it, as {"seconds": 3600}, or remove it to count from 0.'
        ) from None


def write_spent_seconds(run_directory: Path, seconds: float) -> None:
    """Keep how long all starts of a run took so far."""
    write_json(run_directory / SPENT, {"seconds": round(seconds, 1)})
