"""Whether torch.compile pays: the seconds that it takes against those that it saves."""

from dataclasses import dataclass

from accel_gpt2.catalog.gpus import GpuSpec
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.units import format_seconds

# One block, forward and backward, with symbolic sizes, once for micro batches of one row and once
# for larger ones; the other blocks run the same code. On two CPU cores 66 s were measured
# (gpt2-tiny, torch 2.13, docs/log.md); nothing was measured on a GPU yet.
COMPILE_SECONDS = 60.0

# Of a step's time on a GPU: the kernels between the matrix products, fused. A careful guess until
# `make gpu-bench` has measured it; on a CPU it was 0 to 6%, which no run repays.
SAVED_SHARE = 0.10

# What is only guessed must promise twice what it costs.
_MARGIN = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompilingPlan:
    """What compiling costs a run, and what it saves it."""

    seconds: float
    saved_seconds: float

    @property
    def pays(self) -> bool:
        """Whether the run is clearly shorter for it."""
        return self.saved_seconds >= _MARGIN * self.seconds

    @property
    def why(self) -> str:
        """One clause with both numbers."""
        return (
            f"compiling takes about {format_seconds(self.seconds)} and saves about "
            f"{format_seconds(self.saved_seconds)}"
        )


def plan_compiling(train_seconds: float, gpu: GpuSpec | None) -> CompilingPlan:
    """The arithmetic of a run whose steps, of all classes, would take so long without it.

    Args:
        gpu: None for a CPU, where nothing worth it is saved.

    >>> from accel_gpt2.catalog.gpus import find_gpu
    >>> h100 = find_gpu("NVIDIA H100 80GB HBM3", 80 * 2**30)
    >>> [plan_compiling(seconds, h100).pays for seconds in (300.0, 3600.0)]
    [False, True]
    >>> plan_compiling(3600.0, h100).why
    'compiling takes about 1 min 00 s and saves about 6 min 00 s'
    """
    saved = 0.0 if gpu is None else SAVED_SHARE * train_seconds
    return CompilingPlan(seconds=COMPILE_SECONDS, saved_seconds=saved)


def compiling_problem(recipe: TrainRecipe, strategy: ShardingStrategy) -> str | None:
    """What keeps this training from being compiled, as a clause; None where it works.

    It names what tests/train/test_compiling.py does not train.

    >>> from accel_gpt2.catalog.strategies import STRATEGIES
    >>> compiling_problem(TrainRecipe(finetuning="qlora"), STRATEGIES["single"])
    'the kernels of a quantised base cannot be compiled'
    >>> compiling_problem(TrainRecipe(finetuning="lora"), STRATEGIES["ddp"])
    """
    if strategy.backend not in {"none", "ddp"}:
        return f"{strategy.name} gathers weights within the blocks"
    if recipe.finetuning == "qlora":
        return "the kernels of a quantised base cannot be compiled"
    if recipe.use_dora:
        return "DoRA's norms of frozen weights were not compiled yet"
    if recipe.objective not in {"generative", "unconditional"}:
        return f"only language models are compiled, and the objective is {recipe.objective}"
    if recipe.placement == "shared-base":
        return "adapters on a shared base change places in every step"
    return None
