"""The recipe's own step on this machine, for a minute: neither its data nor its weights are needed.

Documents are drawn with the data set's lengths, and weights with the seed; speed and memory depend
on nothing else.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.data.batching import Indices, split_micro_batches
from accel_gpt2.plan.calibration import CalibrationRecord
from accel_gpt2.plan.data import DataStatistics
from accel_gpt2.plan.throughput import cold_tokens_per_second
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.trace.step import training_step
from accel_gpt2.train.calibration import TrainedHere, measured_record
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import TrainedModel, to_device
from accel_gpt2.train.optim import build_optimizer
from accel_gpt2.train.processes import build_accelerator, current_gpu
from accel_gpt2.train.schedule import BatchSchedule
from accel_gpt2.train.throughput import StepTimer, peak_memory_bytes

_WARM_UP_STEPS = 3  # as many as `StepTimer` leaves out
_FEWEST_STEPS = 5  # timed, however long they take
_SMALLEST_BATCH_TOKENS = 256
_MOST_DOCUMENTS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSpeed:
    """What was run and measured.

    `recipe` may have a smaller batch than the one that was asked for, where a minute is too short
    for it. `peak_memory_bytes` are allocated on a GPU, and of the whole process on a CPU.
    """

    recipe: TrainRecipe
    record: CalibrationRecord
    num_steps: int
    peak_memory_bytes: int


def measure_speed(
    recipe: TrainRecipe,
    model: ModelSpec,
    data: DataStatistics,
    *,
    steps: int,
    max_seconds: float,
    on_step: Callable[[int, int], None],
) -> MeasuredSpeed:
    """Time `steps` steps on one device, or as many as fit into `max_seconds`, but five.

    Args:
        model: for the vocabulary; the rest of the shape comes from the recipe's model.
        on_step: called after each step with its number, from 1, and how many there will be.

    Raises:
        UserError: when the model's configuration is not on this machine.
    """
    accelerator = build_accelerator(recipe)
    device: torch.device = accelerator.device
    here = TrainedHere(gpu=current_gpu(accelerator), device=device, num_processes=1)
    total = _WARM_UP_STEPS + steps
    recipe = _short(recipe, model, data, here, seconds_per_step=max_seconds / total)
    lengths = draw_lengths(data, recipe, total)
    schedule = BatchSchedule(lengths, recipe, total_steps=total)
    random = np.random.default_rng(recipe.seed)
    trained = build_model(
        dataclasses.replace(recipe, init="scratch"),
        vocab_size=model.vocab_size,
        eos_token_id=model.vocab_size - 1,
    ).to(device)
    trained.pack_rows(recipe, device)
    trained.train()
    optimizer = build_optimizer(trained, recipe)
    scaler = torch.amp.GradScaler(device.type) if recipe.mixed_precision == "fp16" else None
    timer = StepTimer()
    started = time.monotonic()
    batches = (batch for epoch in range(total) for batch in schedule.epoch(epoch))
    for number, batch in zip(range(1, total + 1), batches, strict=False):
        step_started = time.monotonic()
        cut = split_micro_batches(
            lengths,
            batch,
            world_size=1,
            micro_batch_tokens=recipe.micro_batch_tokens,
            packed=trained.packed,
        )
        tokens = int((lengths[batch] - 1).sum())
        make = partial(_tensors, trained, lengths, random, model.vocab_size, device)
        grad_norm = training_step(
            trained,
            optimizer,
            [partial(make, own) for (own,) in cut],
            recipe,
            num_targets=tokens,
            scaler=scaler,
        )
        float(grad_norm)  # waits for the device, as the loop does
        timer.add(time.monotonic() - step_started, tokens)
        on_step(number, total)
        if timer.num_steps >= _FEWEST_STEPS and time.monotonic() - started > max_seconds:
            break
    record = measured_record(trained, recipe, lengths, timer, here)
    assert record is not None, "what `covers` knows is checked before"
    return MeasuredSpeed(
        recipe=recipe,
        record=record,
        num_steps=timer.num_steps,
        peak_memory_bytes=peak_memory_bytes(device),
    )


def draw_lengths(data: DataStatistics, recipe: TrainRecipe, steps: int) -> NDArray[np.int64]:
    """Lengths in tokens, BOS and EOS included, of enough documents for `steps` steps; the data
    set's longest one is among them."""
    tokens, counts = zip(*(data.lengths or ((round(data.mean_tokens), 1),)), strict=True)
    per_batch = recipe.global_batch_size or (recipe.global_batch_tokens or 1) / data.mean_tokens
    needed = steps * max(1.0, per_batch)
    shares = np.array(counts) / sum(counts)
    drawn = np.random.default_rng(recipe.seed).choice(
        tokens, size=int(min(needed, _MOST_DOCUMENTS)) + 1, p=shares
    )
    drawn[0] = data.longest_tokens - 1
    return drawn.astype(np.int64) + 1


def _short(
    recipe: TrainRecipe,
    model: ModelSpec,
    data: DataStatistics,
    here: TrainedHere,
    *,
    seconds_per_step: float,
) -> TrainRecipe:
    """The recipe with a global batch that takes about so long; speed hardly depends on it."""
    speed = cold_tokens_per_second(recipe, model, here.profile, STRATEGIES["single"], data)
    asked = recipe.global_batch_tokens or int((recipe.global_batch_size or 1) * data.mean_tokens)
    tokens = max(int(speed * seconds_per_step), _SMALLEST_BATCH_TOKENS)
    if tokens >= asked:
        return recipe
    return dataclasses.replace(recipe, global_batch_tokens=tokens, global_batch_size=None)


def _tensors(
    model: TrainedModel,
    lengths: NDArray[np.int64],
    random: np.random.Generator,
    vocab_size: int,
    device: torch.device,
    own: Indices,
) -> tuple[torch.Tensor, ...]:
    documents = [random.integers(0, vocab_size, lengths[i]) for i in own]
    return to_device(model.collate(documents, np.zeros(len(own), dtype=np.int64), epoch=0), device)
