"""The matrix of the original requirements: four sizes of GPT-2, seven machines, two data sets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from accel_gpt2.catalog.profiles import PROFILES, HardwareProfile
from accel_gpt2.plan.calibration import Calibration
from accel_gpt2.plan.placement import PLACEMENTS
from accel_gpt2.plan.search import Option, plan_run
from accel_gpt2.recipe import Layer

TABLE_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TABLE_PROFILES = (
    "rtx4070ti",
    "2x-rtx4070ti",
    "rtx3090",
    "4x-rtx3090",
    "a100-40",
    "a100-80",
    "h100-80",
)
TABLE_DATASETS = ("imdb", "ag_news")  # two and four classes

_AT_ONCE = tuple(name for name in PLACEMENTS if name != "sequential")

# one: a single class's model. sequential: all classes, one after another. parallel: all at once.
Arrangement = Literal["one", "sequential", "parallel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cross:
    """What the original requirements said does not fit on a card of 16 GB.

    They gave no figures for it beside the cross.
    """

    title: str
    model: str
    dataset: str
    arrangement: Arrangement


CROSSES = (
    Cross(
        title="two mediums in parallel", model="gpt2-medium", dataset="imdb", arrangement="parallel"
    ),
    Cross(title="four smalls in parallel", model="gpt2", dataset="ag_news", arrangement="parallel"),
    Cross(title="large", model="gpt2-large", dataset="imdb", arrangement="one"),
    Cross(title="XL", model="gpt2-xl", dataset="imdb", arrangement="one"),
)
_CROSSED_PROFILE = "rtx4070ti"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One model on one machine with one data set.

    `one` and `sequential` are the same recipe; `parallel` is the one for all classes at once, each
    None where nothing fits. `crossed` are the arrangements that the requirements crossed out.
    """

    model: str
    profile: str
    dataset: str
    num_classes: int
    sequential: Option | None
    parallel: Option | None
    crossed: frozenset[Arrangement]


def requirements_table(
    layers: Sequence[Layer] = (), *, calibration: Calibration | None = None
) -> tuple[TableRow, ...]:
    """Every row, the most faithful recipe that fits in each cell.

    Args:
        layers: recipe values for all cells.
        calibration: of this machine, which speaks about its own GPU only.
    """
    return tuple(_rows(layers, calibration))


def _rows(layers: Sequence[Layer], calibration: Calibration | None) -> Iterator[TableRow]:
    for model in TABLE_MODELS:
        for name in TABLE_PROFILES:
            for dataset in TABLE_DATASETS:
                given = [
                    Layer(origin="--table", values={"model": model, "dataset": dataset}),
                    *layers,
                ]
                yield _row(given, PROFILES[name], model, dataset, calibration)


def _row(
    given: Sequence[Layer],
    profile: HardwareProfile,
    model: str,
    dataset: str,
    calibration: Calibration | None,
) -> TableRow:
    one_by_one = plan_run(
        given, profile, placements=("sequential",), depth="none", calibration=calibration
    )
    at_once = plan_run(
        given,
        profile,
        placements=_AT_ONCE,
        depth="none",
        calibration=calibration,
    )
    assert one_by_one.data is not None, "the table's data sets have statistics"
    crossed = {
        cross.arrangement
        for cross in CROSSES
        if (cross.model, cross.dataset, _CROSSED_PROFILE) == (model, dataset, profile.name)
    }
    return TableRow(
        model=model,
        profile=profile.name,
        dataset=dataset,
        num_classes=one_by_one.data.num_classes,
        sequential=one_by_one.recommended,
        parallel=at_once.recommended,
        crossed=frozenset(crossed),
    )


def crossed_cells(rows: Sequence[TableRow]) -> list[tuple[Cross, Option | None]]:
    """Each cross of the requirements, and the recipe that makes it fit after all, if one does."""
    cells = {(row.model, row.dataset): row for row in rows if row.profile == _CROSSED_PROFILE}
    found = []
    for cross in CROSSES:
        row = cells[cross.model, cross.dataset]
        found.append((cross, row.parallel if cross.arrangement == "parallel" else row.sequential))
    return found
