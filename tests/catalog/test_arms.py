"""The arms of a comparison fit the recipe, the run directories and each other."""

import itertools
from pathlib import Path

import pytest

from accel_gpt2.catalog.arms import ARMS, BASE_FINAL, BASE_VALUES, ArmSpec
from accel_gpt2.classify.parts import parts_of
from accel_gpt2.recipe import Layer
from accel_gpt2.recipe.resolving import resolve

_MODELS = {"model": "gpt2", "encoder": "roberta-base"}


@pytest.mark.parametrize("arm", [pytest.param(arm, id=arm.id) for arm in ARMS.values()])
def test_an_arms_values_make_a_recipe(arm: ArmSpec) -> None:
    """With its backbone they resolve, and they are the recipe's values."""
    values = {**arm.recipe_values, "model": _MODELS[arm.backbone or "model"]}
    recipe = resolve([Layer(origin="test", values=values)]).recipe
    assert {key: getattr(recipe, key) for key in values} == values


def test_ids_begin_with_the_number_of_their_arm() -> None:
    """Arms 1 to 8 are all there; a letter follows where an arm has several entries."""
    assert {arm.arm for arm in ARMS.values()} == set(range(1, 9))
    for number, group in itertools.groupby(ARMS.values(), key=lambda arm: arm.arm):
        ids = [arm.id for arm in group]
        letters = [str(number)] if len(ids) == 1 else [f"{number}{x}" for x in "abc"[: len(ids)]]
        assert ids == letters


def test_entries_share_models_but_never_an_evaluation() -> None:
    """Two entries of one directory have the same recipe, and folders of their own in it."""
    places = {(arm.directory, arm.evaluation) for arm in ARMS.values()}
    assert len(places) == len(ARMS)
    shared = [arm for arm in ARMS.values() if arm.directory == ARMS["7a"].directory]
    assert [arm.id for arm in shared] == ["7a", "7b", "7c"]
    assert len({tuple(arm.recipe_values.items()) for arm in shared}) == 1


def test_a_base_is_where_its_objective_exports_it() -> None:
    """The folder that adapters load is the one that an unconditional training writes."""
    assert BASE_VALUES == {"objective": "unconditional"}
    (part,) = parts_of(Path("run"), "unconditional", ("ham", "spam"))
    assert part.finals == (Path("run") / BASE_FINAL,)


def test_names_say_the_model() -> None:
    """A name holds the model exactly where the arm has one."""
    for arm in ARMS.values():
        assert ("{model}" in arm.name) == (arm.backbone is not None), arm.id
