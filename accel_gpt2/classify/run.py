"""A run directory: its names, and what is read back from it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, MinLen
from pydantic import TypeAdapter

from accel_gpt2.classify.bayes import FloatArray, log_priors
from accel_gpt2.classify.parts import Part, parts_of
from accel_gpt2.durable import write_text
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import Count, Layer, TrainRecipe
from accel_gpt2.recipe.layers import read_layer, to_yaml
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train.checkpoint import read_identity
from accel_gpt2.train.manifest import MANIFEST, read_json

CALIBRATION = "calibration.json"  # in the run directory, written when all classes are trained
TRAINING_RECORD = "training.json"  # in `final/`: the best step, tokens, seconds, identity
LOG = "log.jsonl"
PREPARE_LOCK = "prepare.lock"  # in the cache: who reads and tokenises, the others wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run directory that has been started: its recipe and its classes."""

    directory: Path
    recipe: TrainRecipe
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]  # training documents
    data_fingerprint: str

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is trained, in order."""
        return parts_of(self.directory, self.recipe.objective, self.class_names)

    @property
    def finals(self) -> tuple[Path, ...]:
        """The trained models, one per class or one of all, loadable by transformers or peft."""
        return tuple(final for part in self.parts for final in part.finals)

    @property
    def log_prior(self) -> FloatArray:
        """What Bayes' rule adds to the scores of each class, in nats."""
        return score_log_prior(self.recipe, self.class_counts)

    def training_records(self) -> list["TrainingRecord"]:
        """One per part."""
        return [read_training_record(part.finals[0]) for part in self.parts]


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
        part.name
        for part in run.parts
        if not all((final / MANIFEST).is_file() for final in part.finals)
    ]
    if not missing and not (directory / CALIBRATION).is_file():
        missing = [CALIBRATION]
    if finished and recipe.objective == "unconditional":
        raise UserError(
            f"{directory} is one language model of all classes (objective = 'unconditional') and "
            "tells none apart: fine-tune it with --model "
            f"{run.finals[0]} --init pretrained --finetuning lora."
        )
    if finished and missing:
        raise UserError(
            f"{directory} is not trained to the end: {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. {_go_on(directory)}"
        )
    if finished:
        for part in run.parts:
            for final in part.finals:
                check_belongs(run, part, final)
    return run


def check_belongs(run: Run, part: Part, final: Path) -> None:
    """Raise a UserError unless a model was trained by the plan and the recipe that are there."""
    identity = read_identity(read_training_record(final).identity, final / TRAINING_RECORD)
    now: dict[str, object] = {
        "class_name": part.name,
        "data_fingerprint": run.data_fingerprint,
        **{key: getattr(run.recipe, key) for key in _SCORING_FIELDS},
    }
    then = {
        "class_name": identity.class_name,
        "data_fingerprint": identity.data_fingerprint,
        # A key that is not there came with a later version, whose default is what was done then.
        **dataclasses.asdict(TrainRecipe()),
        **identity.recipe,
    }
    changed = [key for key, value in now.items() if then.get(key) != value]
    if changed:
        listed = ", ".join(f"{key} = {then.get(key)!r} (now {now[key]!r})" for key in changed)
        raise UserError(
            f"{final} was trained with {listed}: plan.json or recipe.yaml was changed "
            "since, or belongs to another run. Bring the earlier one back, or train again with "
            "--resume never."
        )


# What a class's scores depend on; the rest of a recipe may be changed by a later start.
_SCORING_FIELDS = (
    "objective", "model", "finetuning", "quantization", "fused_gelu", "max_length",
)  # fmt: skip


def _go_on(directory: Path) -> str:
    recipe_path = directory / "recipe.yaml"
    return f"Go on with `accel-gpt2 train --recipe {recipe_path} --output-dir {directory}`."


def holds_work(run_directory: Path) -> bool:
    """Whether a start would go on from something: a checkpoint or a finished class."""
    return any(run_directory.glob("class-*/checkpoint-*")) or any(
        run_directory.glob("class-*/final")
    )


def score_log_prior(recipe: TrainRecipe, class_counts: Sequence[int]) -> FloatArray:
    """log p(c) in nats, [num_classes]; zero where the scores are log p(c|x) and have it in them."""
    if recipe.objective == "classification":
        return np.zeros(len(class_counts))
    return log_priors(class_counts, recipe.priors)


def write_recipe(run_directory: Path, recipe: TrainRecipe) -> None:
    """`recipe.yaml`, whole or not at all."""
    write_text(run_directory / "recipe.yaml", to_yaml(recipe))


def read_training_record(final: Path) -> TrainingRecord:
    """What is known of a finished class's training.

    Raises:
        UserError: when the record is damaged.
    """
    return read_json(_RECORD_READER, final / TRAINING_RECORD)
