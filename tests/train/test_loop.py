"""The loop's arithmetic: how many steps, how soon a resumed one, what MFU is measured against."""

import time

import numpy as np
import pytest

from accel_gpt2.plan.flops import train_flops_per_token
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.model import build_model
from accel_gpt2.train.schedule import BatchSchedule
from accel_gpt2.train.throughput import flops_per_token


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [
        (1.0, None, 10),
        (1.1, None, 11),  # 1.1 - 1 is a little more than 0.1
        (2.3, None, 23),
        (0.01, None, 1),
        (3.0, 7, 7),
        (3.0, 25, 25),
        (1.5, 99, 15),
    ],
)
def test_steps_of_whole_and_part_epochs(
    epochs: float, max_steps: int | None, expected: int
) -> None:
    """An epoch of ten batches: part of an epoch is part of its batches, and max_steps cuts."""
    recipe = TrainRecipe(
        epochs=epochs, max_steps=max_steps, global_batch_tokens=None, global_batch_size=4
    )
    assert BatchSchedule(np.full(40, 9), recipe).total_steps == expected


def test_a_late_step_is_reached_at_once() -> None:
    """Step 50,000 of a million long documents: under a second of this processor, and no replay."""
    lengths = np.random.default_rng(0).lognormal(5.3, 0.7, 1_000_000).clip(3, 1024).astype(np.int32)
    recipe = TrainRecipe()
    schedule = BatchSchedule(lengths, recipe)
    first_epoch = len(schedule.epoch(0))
    assert first_epoch < 50_000 < schedule.total_steps
    started = time.process_time()
    resumed = BatchSchedule(lengths, recipe, total_steps=schedule.total_steps)
    batch = resumed.epoch(1)[50_000 - first_epoch]
    assert time.process_time() - started < 1.0
    assert np.array_equal(batch, schedule.epoch(1)[50_000 - first_epoch])


def test_mfu_counts_what_is_computed() -> None:
    """Full: plan's formula at the tokens' mean context; LoRA: no gradients of weights."""
    recipe = TrainRecipe(model="gpt2-tiny", init="scratch", max_length=64)
    model = build_model(recipe, vocab_size=300, eos_token_id=0)
    config = model.transformers_model.config
    sizes = {"n_layer": config.n_layer, "n_embd": config.n_embd, "vocab_size": 300}
    lengths = np.array([11, 31])
    full = flops_per_token(model, lengths, recipe)
    assert full == pytest.approx(train_flops_per_token(**sizes, context_tokens=1000 / 40))
    lora = flops_per_token(model, lengths, TrainRecipe(finetuning="lora"))
    weights = 12 * config.n_layer * config.n_embd**2 + 300 * config.n_embd
    assert full - lora == pytest.approx(2 * weights)
