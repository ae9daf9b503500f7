"""The picture of a plan: every recipe's bytes, and the limit."""

import io

import matplotlib
import matplotlib.image
import pytest

from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.plan.run_plan import RunPlan, memory_parts
from accel_gpt2.plan.search import plan_run
from accel_gpt2.recipe import Layer
from accel_gpt2.report.drawing import DARK
from accel_gpt2.report.plan_plot import drawn_options, memory_bars


def planned(**values: object) -> RunPlan:
    return plan_run([Layer(origin="test", values=values)], PROFILES["rtx4070ti"])


@pytest.mark.parametrize(
    "values",
    [{"model": "gpt2"}, {"model": "gpt2-xl"},
     {"model": "gpt2-xl", "finetuning": "full", "mixed_precision": "bf16"}],
)  # fmt: skip
def test_every_plan_can_be_drawn(values: dict[str, object]) -> None:
    """Also one in which nothing fits; the same plan gives the same bytes, in both themes."""
    plan = planned(**values)
    before = dict(matplotlib.rcParams)
    drawn = memory_bars(plan)
    image = matplotlib.image.imread(io.BytesIO(drawn))
    assert image.shape[1] > image.shape[0] > 200
    assert memory_bars(plan) == drawn
    assert memory_bars(plan, DARK) != drawn
    assert dict(matplotlib.rcParams) == before


def test_bars_are_as_long_as_the_device_is_full() -> None:
    """The parts of each bar sum up to the bytes on the device, without gaps or doubles."""
    options = drawn_options(planned(model="gpt2-xl"))
    assert len(options) >= 4
    for option in options:
        parts = memory_parts(option)
        assert sum(size for _, size in parts) == option.device.expected
        assert len({name for name, _ in parts}) == len(parts)
        assert all(size > 0 for _, size in parts)


def test_the_recommended_recipe_comes_first() -> None:
    """Its bar is on top."""
    plan = planned(model="gpt2-large")
    assert drawn_options(plan)[0] is plan.recommended
