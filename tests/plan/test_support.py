"""What goes together: the rules, what they say to type instead, and their page."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.errors import UsageError
from accel_gpt2.plan.placement import PLACEMENTS, Placement
from accel_gpt2.plan.support import VARIANTS, Refusal, check_supported, refusal, support
from accel_gpt2.recipe import Layer, TrainRecipe
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.render.support import support_markdown

ROOT = Path(__file__).parents[2]


def _cells() -> list[tuple[str, str, Refusal]]:
    found = support()
    return [
        (variant, column, cell)
        for variant, row in found.rows.items()
        for column, cell in zip(found.columns, row, strict=True)
        if cell is not None
    ]


def test_the_table_has_every_strategy_and_placement() -> None:
    """A row of the catalog that is added later is a column."""
    assert set(support().columns) == (set(STRATEGIES) | set(PLACEMENTS)) - {"sequential"}
    assert all(len(row) == len(support().columns) for row in support().rows.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_a_recipe(variant: str) -> None:
    """What the table's rows stand for can be asked for; the rules of recipes alone allow it."""
    values = {"model": "gpt2", **VARIANTS[variant]}
    if values.get("objective") == "masked_lm":
        values |= {"model": "roberta-tiny"}
    assert resolve([Layer(origin="test", values=values)]).recipe is not None


@pytest.mark.parametrize(("variant", "column", "found"), _cells())
def test_what_is_said_to_type_instead_works(variant: str, column: str, found: Refusal) -> None:
    """Each option named for a refused cell, put in the place of what was asked, is trained."""
    choices = re.findall(r"--([a-z-]+) ([a-z0-9_-]+)", found.instead)
    assert choices
    for option, value in choices:
        values: dict[str, object] = dict(VARIANTS[variant])
        strategy = STRATEGIES.get(column, STRATEGIES["single"])
        placement = column if column in PLACEMENTS else "sequential"
        if option == "strategy":
            strategy = STRATEGIES[value]
        elif option == "placement":
            placement = value
        else:
            values[option.replace("-", "_")] = value
        values = {"model": "gpt2", **values}
        recipe = resolve([Layer(origin="test", values=values)]).recipe
        assert refusal(recipe, strategy, placement) is None  # type: ignore[arg-type]


def test_a_training_is_refused_in_one_sentence() -> None:
    """What was asked, why not, and what to type."""
    recipe = resolve([Layer(origin="test", values={"optimizer": "adamw_8bit"})]).recipe
    with pytest.raises(UsageError, match=r"with fsdp2: .* DTensors; give --optimizer adamw or"):
        check_supported(recipe, STRATEGIES["fsdp2"])
    check_supported(recipe, STRATEGIES["ddp"])


@pytest.mark.parametrize(
    ("changes", "strategy", "placement", "said"),
    [
        ({"compile": "on"}, "zero3", "sequential", "gathers weights .* give --set compile=off"),
        ({"compile": "on"}, "single", "shared-base", "change places .* give --set compile=off"),
    ],
)
def test_compiling_and_packing_are_refused_before_loading(
    changes: dict[str, Any], strategy: str, placement: Placement, said: str
) -> None:
    """What the plan chooses by itself (`auto`) is nothing to refuse."""
    recipe = TrainRecipe(finetuning="lora", **changes)
    with pytest.raises(UsageError, match=said):
        check_supported(recipe, STRATEGIES[strategy], placement)
    chosen = dataclasses.replace(recipe, **dict.fromkeys(changes, "auto"))
    check_supported(chosen, STRATEGIES[strategy], placement)


def test_one_base_is_not_spread_over_processes() -> None:
    """The nearest is a base for each class; what is named is trained."""
    recipe = resolve([Layer(origin="test", values={"finetuning": "lora"})]).recipe
    with pytest.raises(UsageError, match=r"holds; give --placement per-gpu with --strategy single"):
        check_supported(recipe, STRATEGIES["ddp"], "shared-base")
    check_supported(recipe, STRATEGIES["single"], "per-gpu")
    check_supported(recipe, STRATEGIES["ddp"], "sequential")


def test_the_page_is_what_the_rules_say() -> None:
    """docs/support.md was generated from the rules as they are."""
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert page == support_markdown(), "python -m accel_gpt2.render.support > docs/support.md"
