"""Ask for a trace: the process that asks loads no torch, and what was traced once is remembered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accel_gpt2.recipe import TrainRecipe

# The phases of a step, in order, as `plan.memory` has them too.
PHASES = (
    "forward",
    "loss backward",
    "block backward",
    "embedding backward",
    "optimizer step",
    "evaluation",
    "checkpoint saving",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One training step to trace.

    A micro batch holds as many documents of `longest_tokens` (BOS and EOS included) as the recipe's
    `micro_batch_tokens` allow, and at least one. `num_micro_batches` make a step: with two or more
    there are gradients already while the next one goes through.

    `n_layer` replaces the depth of the model; `stock_loss` takes transformers' own loss under
    accelerate in place of ours; `vocab_size` replaces the model's own.
    """

    recipe: TrainRecipe
    longest_tokens: int
    num_micro_batches: int = 1
    num_classes: int = 2
    n_layer: int | None = None
    vocab_size: int | None = None
    stock_loss: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedMemory:
    """What the step holds on its device at most, in bytes.

    Every tensor counts as what CUDA's allocator gives it, a multiple of 512 bytes, so `peak_bytes`
    is what `torch.cuda.max_memory_allocated` would say. `phases` are the peaks of `PHASES`.
    """

    phases: Mapping[str, int]
    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    num_parameters: int
    num_trained_parameters: int

    @property
    def peak_bytes(self) -> int:
        """Of the fullest phase."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The fullest phase."""
        return max(self.phases, key=lambda name: self.phases[name])


def trace_memory(request: TraceRequest) -> TracedMemory:
    """The memory of one step, by way of `trace_all`."""
    return trace_all([request])[0]


def trace_all(
    requests: Sequence[TraceRequest], *, timeout_seconds: float = 600.0
) -> list[TracedMemory]:
    """The memory of several steps, traced in one process of their own where the cache lacks them.

    It takes about ten seconds to load torch, and then one to three per request.

    Raises:
        UserError: with the reason, when a step cannot be traced, or not in time.
    """
    raise NotImplementedError
