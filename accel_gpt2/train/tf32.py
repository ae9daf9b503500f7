"""fp32 matrix products on the tensor cores of Ampere and later."""

import contextlib
from collections.abc import Iterator

import torch

from accel_gpt2.recipe import TrainRecipe


@contextlib.contextmanager
def products_in_tf32(recipe: TrainRecipe) -> Iterator[None]:
    """Within it CUDA's fp32 products round their factors to 10 bits, where the recipe says so.

    A training's alone: scores stay fp32. Afterwards it is off, whatever it was: trainings that take
    turns are left in another order than they were entered.
    """
    # Not `matmul.fp32_precision`: after that torch's compiler, which asks by the older name, is
    # told of a mix of both and fails (torch 2.13). This one sets both.
    torch.backends.cuda.matmul.allow_tf32 = recipe.tf32 and recipe.mixed_precision == "no"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
