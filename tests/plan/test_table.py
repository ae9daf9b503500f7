"""The requirements' matrix: every cell is there, and each cross has its recipe."""

import pytest

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.plan.table import (
    CROSSES,
    TABLE_DATASETS,
    TABLE_MODELS,
    TABLE_PROFILES,
    TableRow,
    crossed_cells,
    requirements_table,
)


@pytest.fixture(scope="module")
def rows() -> tuple[TableRow, ...]:
    return requirements_table()


def test_the_matrix_is_whole(rows: tuple[TableRow, ...]) -> None:
    """Four sizes on seven machines with two data sets, each once."""
    cells = [(row.model, row.profile, row.dataset) for row in rows]
    assert len(cells) == len(set(cells)) == 4 * 7 * 2
    assert set(TABLE_MODELS) <= set(MODELS)
    assert set(TABLE_PROFILES) <= set(PROFILES)
    assert {(row.dataset, row.num_classes) for row in rows} == {("imdb", 2), ("ag_news", 4)}
    assert len(TABLE_DATASETS) == 2


def test_one_after_another_is_what_this_version_trains(rows: tuple[TableRow, ...]) -> None:
    """The first half of a row can be typed; the second half holds all classes at once."""
    for row in rows:
        assert row.sequential is not None, row
        assert row.parallel is not None, row
        assert row.parallel.placement != "sequential"


def test_a_larger_card_never_asks_for_a_less_faithful_recipe(rows: tuple[TableRow, ...]) -> None:
    """From 16 to 24, 40 and 80 GB the level of each model only becomes better."""
    compared = 0
    for model in TABLE_MODELS:
        for dataset in TABLE_DATASETS:
            levels = [
                row.sequential.level
                for name in ("rtx4070ti", "rtx3090", "a100-40", "a100-80")
                for row in rows
                if (row.model, row.profile, row.dataset) == (model, name, dataset)
                and row.sequential is not None
            ]
            assert levels == sorted(levels, reverse=True)
            compared += len(levels)
    assert compared == 4 * 2 * 4


def test_each_cross_of_the_requirements_fits_with_some_recipe(rows: tuple[TableRow, ...]) -> None:
    """Two mediums and four smalls at once, large and XL on 16 GB: the plan names a recipe."""
    cells = crossed_cells(rows)
    assert [cross for cross, _ in cells] == list(CROSSES)
    assert sum(len(row.crossed) for row in rows) == len(CROSSES) == 4
    for cross, option in cells:
        assert option is not None, cross.title
        assert option.verdict == "fits", cross.title
        usable = option.memory.usable_bytes
        assert usable is not None
        assert option.device.high <= usable < 16 * 2**30
        assert option.recipe.finetuning == "full", cross.title
