"""As few blocks are checkpointed as make a step fit; and what fits a 16 GB card that way."""

import dataclasses
import itertools
from typing import Any

import pytest

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.plan.memory import MemoryPlan, plan_memory
from accel_gpt2.plan.search import RunPlan, plan_run
from accel_gpt2.plan.throughput import plan_time
from accel_gpt2.recipe import Layer, TrainRecipe
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.units import GIB

CARD = PROFILES["rtx4070ti"]


def memory_of(recipe: TrainRecipe) -> MemoryPlan:
    """On one 16 GB card, with documents of full length."""
    return plan_memory(
        recipe,
        MODELS[recipe.model],
        CARD,
        STRATEGIES["single"],
        longest_tokens=recipe.max_length,
    )


def planned(**values: Any) -> RunPlan:
    """On one 16 GB card."""
    return plan_run([Layer(origin="test", values=values)], CARD)


@pytest.mark.parametrize("finetuning", ["full", "lora", "qlora"])
@pytest.mark.parametrize("precision", ["no", "bf16", "pure_bf16"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
def test_each_further_block_takes_less_memory(name: str, precision: Any, finetuning: Any) -> None:
    """So that the fewest that fit can be found by halving; a block less is never smaller."""
    for tokens, use_dora in itertools.product((1024, 8192), {False, finetuning == "lora"}):
        recipe = TrainRecipe(
            model=name,
            mixed_precision=precision,
            finetuning=finetuning,
            use_dora=use_dora,
            gradient_checkpointing=True,
            micro_batch_tokens=tokens,
        )
        peaks = [
            memory_of(dataclasses.replace(recipe, checkpointed_layers=count)).allocated_bytes
            for count in range(1, MODELS[name].n_layer)
        ]
        assert peaks == sorted(peaks, reverse=True)
        if tokens == 8192:  # with few tokens the peak of a small model is where no block counts
            assert peaks[-1] < peaks[0]


@pytest.mark.parametrize(("name", "precision"), [("gpt2-large", "bf16"), ("gpt2-xl", "pure_bf16")])
def test_the_recommended_number_fits_and_one_less_does_not(name: str, precision: str) -> None:
    """And it is faster than all, which fit as well."""
    best = planned(model=name, micro_batch_tokens=2048).recommended
    assert best is not None
    recipe = best.recipe
    assert recipe.mixed_precision == precision
    assert recipe.checkpointed_layers is not None
    assert f"{recipe.checkpointed_layers} blocks checkpointed" in best.label
    less = dataclasses.replace(recipe, checkpointed_layers=recipe.checkpointed_layers - 1)
    assert best.verdict == memory_of(recipe).verdict == "fits"
    assert memory_of(less).verdict != "fits"
    whole = dataclasses.replace(recipe, checkpointed_layers=None)
    times = [
        plan_time(each, MODELS[name], CARD, STRATEGIES["single"], _data(each))
        for each in (recipe, whole)
    ]
    assert times[0] is not None
    assert times[1] is not None
    assert times[0].total.expected < times[1].total.expected


def _data(recipe: TrainRecipe) -> Any:
    from accel_gpt2.plan.data import dataset_statistics

    return dataset_statistics(recipe)


def test_what_is_given_is_kept() -> None:
    """--gradient-checkpointing means all blocks, and a number that number."""
    whole = planned(model="gpt2-large", gradient_checkpointing=True)
    some = planned(model="gpt2-large", gradient_checkpointing=True, checkpointed_layers=35)
    for plan, count in ((whole, None), (some, 35)):
        options = [plan.recommended, *(x.option for x in plan.rejected)]
        counts = {x.recipe.checkpointed_layers for x in options if x is not None}
        assert counts == {count}


# On one 16 GB card, no offload: (recipe, the most that torch may allocate in a step of 1x1024).
FULL_FINE_TUNING = {
    "gpt2-xl": ({"mixed_precision": "pure_bf16", "optimizer": "adamw_8bit"}, 15.0 * GIB),
    "gpt2-large": ({"mixed_precision": "bf16", "optimizer": "adamw"}, 15.7 * GIB),
}


@pytest.mark.parametrize("name", FULL_FINE_TUNING)
def test_large_and_xl_fit_one_16_gb_card_whole(name: str) -> None:
    """All weights trained, nothing offloaded: XL in bf16 with 8-bit states, Large in fp32."""
    values, most = FULL_FINE_TUNING[name]
    layer = {
        **values,
        "model": name,
        "gradient_checkpointing": True,
        "micro_batch_tokens": 1024,
        "max_length": 1024,
    }
    memory = memory_of(resolve([Layer(origin="test", values=layer)]).recipe)
    assert memory.allocated_bytes < most
    assert memory.device.high < most
    assert memory.verdict == "fits"
