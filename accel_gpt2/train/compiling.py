"""torch.compile, of the blocks alone and in place.

All blocks run the same code, so one of them is compiled for all, and sizes are symbolic: whatever
the lengths of documents, there is a program for micro batches of one row and one for larger ones.
Compiled in place, modules and parameters keep their names. Embeddings, last norm and loss stay as
they are, and so does scoring, whose likelihoods are then those that anybody computes again.
"""

import contextlib
import os
from typing import Any

import torch
from torch import nn

from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.data.cache import cache_directory
from accel_gpt2.errors import UserError
from accel_gpt2.plan.compiling import CompilingPlan, compiling_problem
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.objective import TrainedModel


def is_compiled(
    recipe: TrainRecipe,
    strategy: ShardingStrategy,
    device: torch.device,
    plan: CompilingPlan,
    *,
    in_groups: bool = False,
) -> bool:
    """What `compile` of the recipe means here. If it is to be compiled, what is will be kept in our
    cache folder for later runs.

    Args:
        in_groups: whether packed rows attend in groups, each number of which is another program.

    Raises:
        UserError: when it is "on" and this training, or this machine, cannot be compiled for.
    """
    if recipe.compile == "off" or (recipe.compile == "auto" and (in_groups or not plan.pays)):
        return False
    _keep_programs()
    problem = compiling_problem(recipe, strategy) or _compiler_problem(device)
    if problem is not None and recipe.compile == "on":
        raise UserError(f"compile = 'on': {problem}; give --set compile=off, or leave it out.")
    return problem is None


def _keep_programs() -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    # torch has set the variable itself by now, as any optimizer loads its compiler; another folder
    # than its own is somebody's wish.
    if cache_dir() == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_directory() / "compiled")


def _compiler_problem(device: torch.device) -> str | None:
    """What this machine lacks, as a clause."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton, which writes the kernels, is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler (g++ or clang++) on this machine"
    return None


def compile_blocks(model: TrainedModel, *, backend: str = "inductor") -> int:
    """Have the model's blocks compiled at their first step; how many there are."""
    blocks = blocks_of(model)
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    return len(blocks)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers that a decoder repeats."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]


def compiled_seconds() -> float:
    """What this process has spent on compiling so far."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))


def as_written() -> contextlib.AbstractContextManager[Any]:
    """Within it blocks run as transformers wrote them, compiled or not."""
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
