"""A run directory: its names, and what is read back from it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, MinLen
from pydantic import TypeAdapter

from accel_gpt2.durable import write_json, write_text
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import Count, Layer, TrainRecipe, read_layer, resolve, to_yaml
from accel_gpt2.train.checkpoint import read_identity
from accel_gpt2.train.manifest import MANIFEST, read_json

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is read back of plan.json; the rest of it is for people."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}

    class_names: Annotated[tuple[str, ...], MinLen(2)]
    class_counts: tuple[Count, ...]
    data_fingerprint: str
    # The model card is written again with the metrics.
    num_parameters: Count
    num_trainable_parameters: Count
    data_source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """What is read back of training.json; `identity` is for `read_identity`."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True, "allow_inf_nan": False}

    best_step: Annotated[int, Ge(0)]
    steps: Annotated[int, Ge(0)]
    document_tokens: Annotated[int, Ge(0)]
    seconds: Annotated[float, Ge(0)]
    peak_memory_bytes: Annotated[int, Ge(0)]
    identity: dict[str, Any]


_PLAN_READER = TypeAdapter(_Plan)
_RECORD_READER = TypeAdapter(TrainingRecord)


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
        plan = read_json(_PLAN_READER, plan_path)
    except UserError as error:
        raise UserError(f"{error} {_go_on(directory)}") from None
    if not len(plan.class_names) == len(set(plan.class_names)) == len(plan.class_counts):
        raise UserError(
            f"{plan_path} is damaged: its class_names and class_counts do not go together. "
            f"{_go_on(directory)}"
        )
    run = Run(
        directory=directory,
        recipe=recipe,
        class_names=plan.class_names,
        class_counts=plan.class_counts,
        data_fingerprint=plan.data_fingerprint,
    )
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
    if finished:
        for index in range(len(run.class_names)):
            _check_belongs(run, index)
    return run


def _check_belongs(run: Run, index: int) -> None:
    """Raise a UserError unless a class was trained by the plan and the recipe that are there."""
    path = run.final(index) / TRAINING_RECORD
    identity = read_identity(read_training_record(run.final(index)).identity, path)
    now: dict[str, object] = {
        "class_name": run.class_names[index],
        "data_fingerprint": run.data_fingerprint,
        **{key: getattr(run.recipe, key) for key in _SCORING_FIELDS},
    }
    then = {
        "class_name": identity.class_name,
        "data_fingerprint": identity.data_fingerprint,
        **identity.recipe,
    }
    changed = [key for key, value in now.items() if then.get(key) != value]
    if changed:
        listed = ", ".join(f"{key} = {then.get(key)!r} (now {now[key]!r})" for key in changed)
        raise UserError(
            f"{run.final(index)} was trained with {listed}: plan.json or recipe.yaml was changed "
            "since, or belongs to another run. Bring the earlier one back, or train again with "
            "--resume never."
        )


# What a class's scores depend on; the rest of a recipe may be changed by a later start.
_SCORING_FIELDS = ("model", "finetuning", "fused_gelu", "max_length")


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


def read_training_record(final: Path) -> TrainingRecord:
    """What is known of a finished class's training.

    Raises:
        UserError: when the record is damaged.
    """
    return read_json(_RECORD_READER, final / TRAINING_RECORD)


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
