"""Step plans: held against the batches that the data package really makes."""

import statistics

import numpy as np
import pytest

from accel_gpt2.data.batching import epoch_batches, split_micro_batches
from accel_gpt2.plan.data import length_statistics
from accel_gpt2.plan.steps import num_evaluations, num_saves, plan_steps
from accel_gpt2.recipe import TrainRecipe

# Shape and scale of gamma distributions: like AG News' lengths, like IMDB's, nearly constant.
LENGTHS = {"news": (8.0, 6.7), "reviews": (1.8, 165.0), "constant": (400.0, 0.25)}


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize(
    ("batch_tokens", "batch_size", "micro_batch_tokens"),
    [
        (8192, None, 4096),
        (8192, None, 16384),
        (2048, None, 1024),
        (512, None, 4096),
        (None, 16, 4096),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_and_micro_batches_are_those_of_the_real_batches(
    kind: str,
    batch_tokens: int | None,
    batch_size: int | None,
    micro_batch_tokens: int,
    world_size: int,
    packed: bool,
) -> None:
    """Steps of an epoch within 4%, micro batches of a mean step within half, padding within 4%."""
    drawn = np.random.default_rng(0).gamma(*LENGTHS[kind], 6000)
    lengths = np.clip(np.rint(drawn), 3, 1024).astype(np.int64) + 1
    recipe = TrainRecipe(
        epochs=1.0,
        objective="unconditional",
        global_batch_tokens=batch_tokens,
        global_batch_size=batch_size,
        micro_batch_tokens=micro_batch_tokens,
        packing="on" if packed else "off",
    )
    data = length_statistics(lengths.tolist(), source="")
    plan = plan_steps(recipe, data, world_size)
    batches = epoch_batches(
        lengths,
        global_batch_tokens=batch_tokens,
        global_batch_size=batch_size,
        seed=0,
        epoch=0,
    )
    assert plan.num_steps == pytest.approx(len(batches), rel=0.04)
    cuts = [
        split_micro_batches(
            lengths,
            batch,
            world_size=world_size,
            micro_batch_tokens=micro_batch_tokens,
            packed=packed,
        )
        for batch in batches
    ]
    assert plan.micro_batches == pytest.approx(statistics.mean(map(len, cuts)), abs=0.5)
    pieces = [piece for cut in cuts for step in cut for piece in step if len(piece)]
    padded = sum(len(piece) * (lengths[piece].max() - 1) for piece in pieces)
    if packed:
        assert plan.padded_share == 1.0
    elif batch_tokens != 512:  # batches of one or two reviews have other padding
        assert (lengths - 1).sum() / padded == pytest.approx(plan.padded_share, abs=0.04)


def test_steps_stop_at_the_limit() -> None:
    """`max_steps` ends a training early; evaluations and checkpoints come at the end too."""
    data = length_statistics([101] * 1000, source="")
    recipe = TrainRecipe(
        objective="unconditional",
        epochs=2.0,
        max_steps=30,
        global_batch_tokens=1000,
        evaluate_every_steps=8,
        checkpoint_every_steps=5,
    )
    plan = plan_steps(recipe, data, 1)
    assert plan.num_steps == 30
    assert num_evaluations(recipe, plan) == 4  # 8, 16, 24, 30
    assert (
        num_saves(recipe, plan.num_steps, plan.steps_per_epoch) == 9
    )  # 5, 8, 10, 15, 16, 20, 24, 25, 30
