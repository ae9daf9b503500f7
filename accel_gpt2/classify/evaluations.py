"""Which entries of a comparison are evaluated, and with what result; without loading torch."""

import json
from pathlib import Path
from typing import Any

from accel_gpt2.catalog.arms import ArmSpec
from accel_gpt2.classify.aside import is_trained
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe, result_differences
from accel_gpt2.recipe.layers import read_layer
from accel_gpt2.recipe.resolving import resolve

METRICS = "metrics.json"
OUT_OF_DISTRIBUTION = "out_of_distribution.json"


def read_metrics(run_directory: Path, arm: ArmSpec) -> dict[str, Any] | None:
    """The metrics of an entry's run; None when it is not evaluated.

    Raises:
        UserError: when they are damaged.
    """
    return _read(run_directory / arm.evaluation / METRICS)


def read_out_of_distribution(
    run_directory: Path, arm: ArmSpec, dataset: str
) -> dict[str, Any] | None:
    """How the entry told another data set from its own since it was evaluated, None if it was not.

    Raises:
        UserError: when it is damaged.
    """
    folder = run_directory / arm.evaluation
    found = _read(folder / OUT_OF_DISTRIBUTION)
    if found is None or found.get("dataset") != dataset:
        return None
    return found if _is_newer(folder / OUT_OF_DISTRIBUTION, folder / METRICS) else None


def is_evaluated(run_directory: Path, arm: ArmSpec, recipe: TrainRecipe) -> bool:
    """Whether an entry's metrics are those of the models, and of the recipe, that are there."""
    metrics = run_directory / arm.evaluation / METRICS
    if not metrics.is_file():
        return False
    if not arm.trained:
        before = resolve([read_layer(run_directory / "recipe.yaml")]).recipe
        return not result_differences(before, recipe)
    finals = run_directory.glob("class-*/final")
    return is_trained(run_directory) and all(_is_newer(metrics, final) for final in finals)


def _is_newer(path: Path, other: Path) -> bool:
    return path.stat().st_mtime >= other.stat().st_mtime


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it and start the comparison again, which "
            "evaluates that run anew."
        ) from None
    return content
