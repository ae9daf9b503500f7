"""How many optimizer steps a training has, and how it is cut: what `data.batching` will come to."""

import math
from dataclasses import dataclass

from accel_gpt2.plan.data import DataStatistics
from accel_gpt2.recipe import TrainRecipe

# Documents of similar length share a micro batch, which leaves little padding: 0.97 on AG News'
# and IMDB's lengths, for any batch of more than a few documents.
PADDED_SHARE = 0.97

_POOL_BATCHES = 64  # data.batching's: the last batch of each pool is half full on average


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One training (of a class, or of the only model) in steps.

    `tokens` are predicted tokens of a mean step, padding not counted, over all processes;
    `micro_batches` is how many of them each process puts through one after another.
    """

    num_models: int
    num_steps: int
    steps_per_epoch: int
    tokens: float
    micro_batches: int


def plan_steps(recipe: TrainRecipe, data: DataStatistics, world_size: int) -> StepPlan:
    """Steps of one model, expected from mean lengths; `tests/plan/test_steps.py` holds it against
    the real batches.

    >>> from accel_gpt2.plan.data import dataset_statistics
    >>> recipe = TrainRecipe(dataset="imdb", epochs=1)
    >>> plan = plan_steps(recipe, dataset_statistics(recipe), world_size=1)
    >>> plan.num_models, plan.num_steps, round(plan.tokens), plan.micro_batches
    (2, 428, 7962, 3)
    """
    num_models = data.num_classes if recipe.objective in {"generative", "masked_lm"} else 1
    documents = data.num_train_documents / num_models
    mean, context = data.mean_tokens, data.mean_context_tokens
    if recipe.global_batch_size is not None:
        per_batch = float(recipe.global_batch_size)
    else:
        assert recipe.global_batch_tokens is not None, "the recipe gives one of the two"
        # A batch ends where the next document would not fit: half of one stays free.
        per_batch = max(1.0, (recipe.global_batch_tokens - context / 2) / mean)
    per_batch = min(per_batch, documents)
    whole = documents / per_batch
    steps_per_epoch = math.ceil(whole + 0.5 * math.ceil(whole / _POOL_BATCHES) - 0.5)
    num_steps = math.ceil(recipe.epochs * steps_per_epoch)
    if recipe.max_steps is not None:
        num_steps = min(num_steps, recipe.max_steps)
    tokens = documents * mean / steps_per_epoch
    room = max(recipe.micro_batch_tokens - context / 2, context)  # one document goes through always
    pieces = max(1, math.ceil(tokens / PADDED_SHARE / room))
    return StepPlan(
        num_models=num_models,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        tokens=tokens,
        micro_batches=math.ceil(pieces / world_size),
    )


def num_evaluations(recipe: TrainRecipe, steps: StepPlan) -> int:
    """How often one model scores the validation documents: at each interval, and at the end."""
    return math.ceil(steps.num_steps / (recipe.evaluate_every_steps or steps.steps_per_epoch))


def num_saves(recipe: TrainRecipe, steps: StepPlan) -> int:
    """How many checkpoints one model writes when nothing stops it: at evaluations and between."""
    evaluations = recipe.evaluate_every_steps or steps.steps_per_epoch
    saves = {*range(evaluations, steps.num_steps, evaluations), steps.num_steps}
    if recipe.checkpoint_every_steps is not None:
        saves.update(range(0, steps.num_steps, recipe.checkpoint_every_steps))
    return len(saves - {0})
