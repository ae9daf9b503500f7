"""What a comparison would run: which run directories, in which order, with which recipe values."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from accel_gpt2.catalog.arms import ARMS, BASE_DIRECTORY, BASE_FINAL, BASE_VALUES, ArmSpec
from accel_gpt2.catalog.models import MODELS
from accel_gpt2.errors import UsageError
from accel_gpt2.recipe import FIELDS, RUN_FIELDS, Init, Layer, TrainRecipe

# What the comparison decides for every run. An earlier layer that says something else is overruled.
DECIDED_FIELDS = ("objective", "finetuning", "seed")

# What an adapter's model does not share with a recipe of the model that its base is.
_OF_THE_MODEL = frozenset({"model", "init", "tokenizer", "tokenizer_vocab_size", *DECIDED_FIELDS})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run directory of a comparison.

    `arms` are the entries whose numbers come from it: none for a base that adapters stand on,
    three where one training is evaluated in three ways. `directory` is relative to the
    comparison's, and so is `base`, a run that has to be trained first. `layer` goes on top of what
    the person gave. `documents_per_class` is None for all training documents, else a point of the
    learning curve.
    """

    arms: tuple[ArmSpec, ...]
    directory: str
    layer: Layer
    seed: int
    documents_per_class: int | None = None
    base: str | None = None

    @property
    def is_trained(self) -> bool:
        """Whether it goes through the training loop."""
        return not self.arms or self.arms[0].trained

    @property
    def is_main(self) -> bool:
        """Whether it stands for its entries: all documents, first seed."""
        return bool(self.arms) and self.documents_per_class is None and self.seed == 0


def select_arms(text: str) -> tuple[ArmSpec, ...]:
    """The entries of `--arms`: "all", or numbers of arms and ids of entries with commas between.

    Raises:
        UsageError: naming what is no arm.

    >>> [arm.id for arm in select_arms("5, 1,7b")]
    ['1a', '1b', '5', '7b']
    """
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    if words == ["all"]:
        return tuple(ARMS.values())
    known = {*ARMS, *(str(arm.arm) for arm in ARMS.values())}
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        raise UsageError(
            f"--arms {text!r}: {', '.join(unknown) or 'nothing'} is no arm; give numbers from 1 to "
            f"{max(arm.arm for arm in ARMS.values())} or ids ({', '.join(ARMS)}), with commas "
            "between, or all."
        )
    return tuple(arm for arm in ARMS.values() if arm.id in words or str(arm.arm) in words)


def default_encoder(init: Init) -> str:
    """The encoder of arms 6 and 7: like the model a pretrained one, or one from random weights.

    For the latter a small one, with a tokenizer of the training text: nothing has to be fetched.

    >>> default_encoder("scratch"), default_encoder("pretrained")
    ('roberta-tiny', 'roberta-base')
    """
    return "roberta-tiny" if init == "scratch" else "roberta-base"


def shared_max_length(recipe: TrainRecipe, arms: Sequence[ArmSpec], encoder: str) -> int:
    """The longest document in tokens, for all arms alike: what the smaller backbone can read.

    >>> shared_max_length(TrainRecipe(), [ARMS["3"]], "gpt2-tiny")
    1024
    >>> shared_max_length(TrainRecipe(), [ARMS["3"], ARMS["6"]], "gpt2-tiny")
    512
    """
    row = MODELS.get(encoder)
    if row is None or all(arm.backbone != "encoder" for arm in arms):
        return recipe.max_length
    return min(recipe.max_length, row.n_positions)


def plan_runs(
    arms: Sequence[ArmSpec],
    recipe: TrainRecipe,
    *,
    encoder: str,
    directory: Path,
    num_seeds: int = 1,
    train_documents: Sequence[int] = (),
) -> tuple[PlannedRun, ...]:
    """Every run directory; each arm is trained once before any of them a second time.

    Args:
        recipe: of the comparison, as arm 3 would train it.
        directory: the comparison's, where the bases of adapters will lie.
        num_seeds: seeds 0 to num_seeds - 1.
        train_documents: documents per class of the learning curve's points below the full run.

    >>> [run.directory for run in plan_runs(
    ...     select_arms("2,3"), TrainRecipe(), encoder="", directory=Path(), num_seeds=2)]
    ['arm-2-zero-shot/seed-0', 'arm-3-generative/seed-0', 'arm-3-generative/seed-1']
    """
    by_directory: dict[str, list[ArmSpec]] = {}
    for arm in arms:
        by_directory.setdefault(arm.directory, []).append(arm)
    shared = {"max_length": shared_max_length(recipe, arms, encoder)}
    runs: list[PlannedRun] = []
    for documents in (None, *sorted(set(train_documents), reverse=True)):
        for seed in range(num_seeds):
            for group in by_directory.values():
                if group[0].kind == "zero_shot" and (seed or documents is not None):
                    continue  # it has no training documents that could be others
                point = PlannedRun(
                    arms=tuple(group),
                    directory=_folder(group[0].directory, seed, documents),
                    layer=Layer(origin=f"arm {group[0].arm}", values={**shared, "seed": seed}),
                    seed=seed,
                    documents_per_class=documents,
                )
                runs += _with_values(point, recipe, encoder=encoder, directory=directory)
    return tuple(runs)


def _folder(parent: str, seed: int, documents: int | None) -> str:
    return f"{parent}/{'' if documents is None else f'documents-{documents}-'}seed-{seed}"


def _with_values(
    point: PlannedRun, recipe: TrainRecipe, *, encoder: str, directory: Path
) -> Iterator[PlannedRun]:
    """The run with its arm's recipe values, after the base that it stands on, where it needs one.

    An adapter on random weights learns next to nothing, so one language model of all the text is
    trained first where the model has no pretrained weights.
    """
    (arm, *_) = point.arms
    values = dict(point.layer.values)
    if point.documents_per_class is not None:
        values["train_documents_per_class"] = point.documents_per_class
    base = None
    if arm.recipe_values.get("finetuning") == "lora" and recipe.init == "scratch":
        base = _folder(BASE_DIRECTORY, point.seed, point.documents_per_class)
        layer = Layer(origin=f"base of arm {arm.arm}", values={**values, **BASE_VALUES})
        yield dataclasses.replace(point, arms=(), directory=base, layer=layer)
        values = {**_adapter_values(recipe, directory / base / BASE_FINAL), **values}
    if arm.backbone == "encoder":
        values["model"] = encoder
    values = {"finetuning": "full", **values, **arm.recipe_values}
    yield dataclasses.replace(
        point, layer=Layer(origin=point.layer.origin, values=values), base=base
    )


def _adapter_values(recipe: TrainRecipe, base: Path) -> dict[str, object]:
    """Recipe values of adapters on a base in a folder, to which no row of the catalog gives its
    own: the comparison's stay."""
    values = dataclasses.asdict(recipe)
    kept = {key: values[key] for key in FIELDS if key not in _OF_THE_MODEL | RUN_FIELDS}
    return {**kept, "model": str(base), "init": "pretrained", "tokenizer": "auto"}
