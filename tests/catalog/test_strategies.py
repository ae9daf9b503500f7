"""Each way to spread a training says what it shards, once."""

from typing import get_args

import pytest

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.catalog.strategies import STRATEGIES, ShardingStrategy, StrategyName


def test_the_strategies() -> None:
    """Exactly these exist, under their own names, and what `train` runs today is said."""
    assert list(STRATEGIES) == [
        "single",
        "ddp",
        "fsdp2",
        "zero1",
        "zero2",
        "zero3",
        "zero2_offload",
        "zero3_offload",
    ]
    assert list(get_args(StrategyName)) == list(STRATEGIES)
    assert all(row.name == name and row.source for name, row in STRATEGIES.items())
    assert len({row.title for row in STRATEGIES.values()}) == len(STRATEGIES)


@pytest.mark.parametrize("row", STRATEGIES.values(), ids=STRATEGIES)
def test_shards_follow_the_stage(row: ShardingStrategy) -> None:
    """ZeRO's stages shard optimizer state, then gradients, then parameters (its paper's 5.1-5.3);
    FSDP2 shards all three; the others nothing."""
    stage = 3 if row.backend == "fsdp2" else row.zero_stage
    assert (row.shards_optimizer, row.shards_gradients, row.shards_parameters) == (
        stage >= 1,
        stage >= 2,
        stage >= 3,
    )
    assert row.is_sharded == (stage > 0)
    assert row.zero_stage == 0 or row.backend == "deepspeed"
    assert not row.offloads_parameters or (row.offloads_optimizer and row.shards_parameters)
    assert row.offloads_optimizer == row.name.endswith("_offload")


def test_no_bucket_is_larger_than_a_small_model() -> None:
    """DeepSpeed's own default of 5e8 elements is four times GPT-2; ours are a tenth of it."""
    sizes = {row.bucket_elements for row in STRATEGIES.values() if row.backend == "deepspeed"}
    assert sizes
    assert all(0 < size < MODELS["gpt2"].num_parameters / 10 for size in sizes)


@pytest.mark.parametrize("row", STRATEGIES.values(), ids=STRATEGIES)
def test_shares_take_two_and_host_memory_helps_one(row: ShardingStrategy) -> None:
    """Spreading over GPUs alone does nothing on one of them."""
    alone = row.name == "single" or row.offloads_optimizer
    assert row.smallest_world_size == (1 if alone else 2)
