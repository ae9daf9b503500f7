"""How many optimizer steps a training has, and how it is cut: what `data.batching` will come to."""

import functools
import math
from dataclasses import dataclass

from accel_gpt2.catalog.datasets import TokenLengths
from accel_gpt2.plan.data import DataStatistics
from accel_gpt2.recipe import TrainRecipe

# Documents of similar length share a batch, but for data.batching's blur of a tenth either way: the
# longest of a batch is about a tenth longer than the mean, and less so in each of several pieces.
_BLUR_PADDING = 0.09

_POOL_BATCHES = 64  # data.batching's: the last batch of each pool is half full on average


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
    """Steps of one model, from the lengths of documents: each batch is of documents of one length.

    `tests/plan/test_steps.py` holds it against the real batches.

    >>> from accel_gpt2.plan.data import dataset_statistics
    >>> recipe = TrainRecipe(dataset="imdb", epochs=1)
    >>> plan = plan_steps(recipe, dataset_statistics(recipe), world_size=1)
    >>> plan.num_models, plan.num_steps, round(plan.tokens), round(plan.micro_batches, 1)
    (2, 426, 7955, 2.9)
    """
    num_models = data.num_classes if recipe.objective in {"generative", "masked_lm"} else 1
    documents = data.num_train_documents / num_models
    lengths = data.lengths or ((round(data.mean_tokens), 1),)
    batches, micro_batches, padded_share = _cut(
        lengths,
        recipe.global_batch_size,
        recipe.global_batch_tokens,
        recipe.micro_batch_tokens,
        world_size,
    )
    batches *= documents / sum(count for _, count in lengths)
    steps_per_epoch = math.ceil(batches + 0.5 * (math.ceil(batches / _POOL_BATCHES) - 1))
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
) -> tuple[float, float, float]:
    """Batches of all these documents, micro batches of a batch, the share that is no padding."""
    batches = pieces = whole = padded = 0.0
    for tokens, count in lengths:
        if global_batch_size is not None:
            per_batch = global_batch_size
        else:
            assert global_batch_tokens is not None, "the recipe gives one of the two"
            per_batch = max(1, global_batch_tokens // tokens)
        per_piece = max(1, int(micro_batch_tokens * (1 - _BLUR_PADDING / 3) / tokens))
        cut = math.ceil(per_batch / per_piece)
        batches += count / per_batch
        pieces += count / per_batch * math.ceil(cut / world_size)
        whole += count * tokens
        padded += count * tokens / (1 - _BLUR_PADDING / max(cut, world_size))
    return batches, pieces / batches, whole / padded


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
