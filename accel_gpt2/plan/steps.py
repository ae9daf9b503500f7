"""How many optimizer steps a training has, and how it is cut: what `data.batching` will come to."""

import functools
import itertools
import math
import random
from dataclasses import dataclass

from accel_gpt2.catalog.datasets import TokenLengths
from accel_gpt2.plan.cutting import cut_by_tokens, cut_evenly, cut_padded
from accel_gpt2.plan.data import DataStatistics
from accel_gpt2.plan.packing import packs_rows
from accel_gpt2.recipe import TrainRecipe

# Documents are drawn as a training draws them: enough for its steps to be within two percent, and
# few enough for a plan of many candidates, which takes a millisecond.
_FEWEST_SAMPLED, _SAMPLED_BATCHES = 4000, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One training (of a class, or of the only model) in steps.

    `tokens` are predicted tokens of a mean step, padding not counted, over all processes;
    `micro_batches` is the mean number of them that each process puts through one after another, and
    `padded_share` is `tokens` over what these are with their padding.
    """

    num_models: int
    num_steps: int
    steps_per_epoch: int
    tokens: float
    micro_batches: float
    padded_share: float


def plan_steps(recipe: TrainRecipe, data: DataStatistics, world_size: int) -> StepPlan:
    """Steps of one model, from the lengths of documents: each batch is a sample of them.

    `tests/plan/test_steps.py` holds it against the real batches.

    >>> from accel_gpt2.plan.data import dataset_statistics
    >>> recipe = TrainRecipe(dataset="imdb", epochs=1)
    >>> plan = plan_steps(recipe, dataset_statistics(recipe), world_size=1)
    >>> plan.num_models, plan.num_steps, round(plan.tokens), round(plan.micro_batches, 1)
    (2, 429, 7899, 2.4)
    """
    num_models = data.num_classes if recipe.objective in {"generative", "masked_lm"} else 1
    documents = data.num_train_documents / num_models
    lengths = data.lengths or ((round(data.mean_tokens), 1),)
    per_batch, micro_batches, padded_share = _cut(
        lengths,
        recipe.global_batch_size,
        recipe.global_batch_tokens,
        recipe.micro_batch_tokens,
        world_size,
        packs_rows(recipe),
    )
    steps_per_epoch = math.ceil(documents / per_batch)
    num_steps = math.ceil(recipe.epochs * steps_per_epoch)
    if recipe.max_steps is not None:
        num_steps = min(num_steps, recipe.max_steps)
    return StepPlan(
        num_models=num_models,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        tokens=documents * data.mean_tokens / steps_per_epoch,
        micro_batches=micro_batches,
        padded_share=padded_share,
    )


@functools.cache
def _cut(
    lengths: TokenLengths,
    global_batch_size: int | None,
    global_batch_tokens: int | None,
    micro_batch_tokens: int,
    world_size: int,
    packed: bool,
) -> tuple[float, float, float]:
    """Documents of a batch, micro batches of a batch, the share that is no padding."""
    per_batch, sample = _sample_batches(lengths, global_batch_size, global_batch_tokens)
    micro_batches = whole = padded = 0
    for batch in sample:
        cut = cut_by_tokens if packed else cut_padded
        cuts = cut_evenly(cut, batch, micro_batch_tokens, world_size)
        micro_batches += math.ceil((len(cuts) - 1) / world_size)
        whole += sum(batch)
        padded += sum((end - start) * batch[start] for start, end in itertools.pairwise(cuts))
    return per_batch, micro_batches / len(sample), 1.0 if packed else whole / padded


@functools.cache
def _sample_batches(
    lengths: TokenLengths, global_batch_size: int | None, global_batch_tokens: int | None
) -> tuple[float, list[list[int]]]:
    """The mean number of documents in a batch, and some batches: lengths, the longest first."""
    tokens, counts = zip(*lengths, strict=True)
    average = sum(length * count for length, count in lengths) / sum(counts)
    about = global_batch_size or (global_batch_tokens or 1) / average
    drawn = random.Random(0).choices(tokens, counts, k=max(_FEWEST_SAMPLED, math.ceil(3 * about)))
    if global_batch_size is not None:
        cuts = list(range(0, len(drawn) + 1, global_batch_size))
        per_batch = float(global_batch_size)
    else:
        assert global_batch_tokens is not None, "the recipe gives one of the two"
        cuts = cut_by_tokens(drawn, global_batch_tokens)[:-1]  # the last may not be full
        per_batch = cuts[-1] / (len(cuts) - 1)
    batches = [
        sorted(drawn[start:end], reverse=True)
        for start, end in itertools.islice(itertools.pairwise(cuts), _SAMPLED_BATCHES)
    ]
    return per_batch, batches


def num_evaluations(recipe: TrainRecipe, steps: StepPlan) -> int:
    """How often one model scores the validation documents: at each interval, and at the end."""
    return math.ceil(steps.num_steps / (recipe.evaluate_every_steps or steps.steps_per_epoch))


def num_saves(recipe: TrainRecipe, total_steps: int, steps_per_epoch: int) -> int:
    """How many checkpoints one model writes when nothing stops it: at evaluations and between.

    >>> recipe = TrainRecipe(checkpoint_every_steps=40)
    >>> num_saves(recipe, 300, 100)  # 40, 80, ..., 280 and the epochs' ends, 200 among both
    9
    """
    evaluations = recipe.evaluate_every_steps or steps_per_epoch
    saves = {*range(evaluations, total_steps, evaluations), total_steps}
    if recipe.checkpoint_every_steps is not None:
        saves.update(range(0, total_steps, recipe.checkpoint_every_steps))
    return len(saves - {0})
