"""Autocast's 16-bit copies of the weights, made once in a step of several micro batches."""

import contextlib
from collections.abc import Iterator

import torch

from accel_gpt2.recipe import TrainRecipe


@contextlib.contextmanager
def casts_kept(recipe: TrainRecipe) -> Iterator[None]:
    """Within it autocast keeps its copies of the weights from one forward pass to the next.

    The weights must not change between those passes. Nothing is kept of a recipe with checkpointed
    blocks, whose copies would stay through a backward pass that has no need of them, nor of
    adapters that take turns on a shared base: torch has one cache for all models, and they are
    small.
    """
    if recipe.gradient_checkpointing or recipe.placement == "shared-base":
        yield
        return
    # What others left there may be of older weights, or have no gradient.
    torch.clear_autocast_cache()
    # Autocast empties its cache where its outermost context ends; this counts as one.
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
