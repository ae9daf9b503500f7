"""Where the models of the classes are trained: what of it a plan recommends, and what it counts."""

import pytest

from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.plan.placement import PLACEMENTS, Placement, models_per_gpu
from accel_gpt2.plan.search import Option, RunPlan, plan_run
from accel_gpt2.recipe import Layer


def planned(profile: str, **values: object) -> RunPlan:
    """The plan for some values on a machine."""
    return plan_run([Layer(origin="test", values=values)], PROFILES[profile])


def recommended(profile: str, **values: object) -> Option:
    """What is recommended there."""
    option = planned(profile, **values).recommended
    assert option is not None
    return option


@pytest.mark.parametrize(
    ("model", "dataset"), [("gpt2", "imdb"), ("gpt2-medium", "imdb"), ("gpt2", "ag_news")]
)
def test_a_class_for_each_gpu_goes_before_ddp(model: str, dataset: str) -> None:
    """Processes that exchange nothing are faster, wherever one class fits one card; and the recipe
    that `train` follows says it."""
    option = recommended("2x-rtx4070ti", model=model, dataset=dataset)
    assert (option.strategy.name, option.placement) == ("single", "per-gpu")
    assert option.recipe.placement == "per-gpu"
    slower = [x for x in planned("2x-rtx4070ti", model=model, dataset=dataset).rejected
              if x.option is not None and x.option.strategy.name == "ddp"
              and x.option.level == option.level and x.why == "slower"]  # fmt: skip
    assert slower


def test_one_model_of_all_classes_is_spread_and_not_placed() -> None:
    """There is nothing to place where all classes are one training."""
    option = recommended("2x-rtx4070ti", model="gpt2", objective="unconditional")
    assert (option.strategy.name, option.placement) == ("ddp", "sequential")


def test_side_by_side_on_one_gpu_is_no_plan_of_its_own() -> None:
    """It is slower without MPS, and so it is for who asks for it."""
    assert PLACEMENTS["concurrent"].speed < 1.0
    assert recommended("rtx4070ti", model="gpt2").placement == "sequential"
    asked = recommended("rtx4070ti", model="gpt2", placement="concurrent")
    assert asked.placement == "concurrent"


def test_side_by_side_is_refused_where_all_contexts_and_models_do_not_fit() -> None:
    """Two of them fit alone and not together; the plan says what they would need."""
    given = {"model": "gpt2-xl", "finetuning": "full", "optimizer": "adamw_8bit",
             "mixed_precision": "pure_bf16"}  # fmt: skip
    assert recommended("rtx4070ti", placement="sequential", **given)
    plan = planned("rtx4070ti", placement="concurrent", **given)
    assert plan.recommended is None
    alone = plan.smallest.memory.device
    assert plan.smallest.device.expected == 2 * alone.expected


def test_without_a_gpu_all_models_share_the_ram() -> None:
    """One class for each core is several models in one memory."""
    assert models_per_gpu("per-gpu", num_models=3, num_gpus=0) == 3
    assert models_per_gpu("sequential", num_models=3, num_gpus=0) == 1


@pytest.mark.parametrize(
    ("profile", "placement", "keep_checkpoints", "checkpoints", "processes"),
    [
        # By hand, of four classes: the newest and the best of each, and those being written.
        ("a100-40", "sequential", 2, 4 * 3 + 1, 1),
        ("a100-40", "sequential", 5, 4 * 6 + 1, 1),
        ("a100-40", "concurrent", 2, 4 * 3 + 4, 4),
        ("2x-rtx4070ti", "per-gpu", 2, 4 * 3 + 2, 2),
        ("a100-40", "shared-base", 1, 4 * 2 + 1, 1),
    ],
)
def test_disk_and_ram_are_of_the_whole_run(
    profile: str, placement: Placement, keep_checkpoints: int, checkpoints: int, processes: int
) -> None:
    """Every class leaves its checkpoints and its model; processes side by side share no RAM."""
    option = recommended(
        profile,
        model="gpt2",
        dataset="ag_news",
        finetuning="lora",
        placement=placement,
        keep_checkpoints=keep_checkpoints,
    )
    assert option.placement == placement
    one = {term.name: term.bytes for term in option.memory.disk}
    assert {term.name: term.bytes for term in option.disk} == {
        "checkpoints": checkpoints * one["checkpoints"] // (keep_checkpoints + 2),
        "final models": 4 * one["final models"],
    }
    assert option.host_bytes == processes * option.memory.host_bytes
