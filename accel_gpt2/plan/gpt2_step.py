"""What one training step of GPT-2 is made of: widths, sizes and shapes, from which bytes follow.

N are the padded tokens of a micro batch, d is n_embd, L n_layer, V vocab_size, P the number of
trained parameters, C the tokens of a loss chunk.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.plan.memory_types import MemoryTerm
from accel_gpt2.recipe import TrainRecipe

# A block's four projections by path, with inputs and outputs in units of d.
PROJECTIONS = {
    "attn.c_attn": (1, 3),
    "attn.c_proj": (1, 1),
    "mlp.c_fc": (1, 4),
    "mlp.c_proj": (4, 1),
}

Shapes = tuple[tuple[tuple[int, ...], int], ...]


@dataclass(frozen=True, kw_only=True)  # without slots: what follows from the fields is kept
class Gpt2Step:
    """One training step of one process.

    `tokens` are those of a micro batch, padding included, and `length` those of its longest
    document that go in. `accumulates` says whether a step has more than one micro batch, so that
    gradients are there while the next one goes through. `attends_in_groups` is
    `plan.packing.attends_in_groups`, `scores_by_halves` how scores multiply with the head
    (`train.loss.chunked_log_likelihoods`).
    """

    recipe: TrainRecipe
    model: ModelSpec
    strategy: ShardingStrategy
    world_size: int
    tokens: int
    length: int
    accumulates: bool
    stock_loss: bool
    on_gpu: bool
    attends_in_groups: bool
    scores_by_halves: bool

    # ---- Widths, in bytes an element.

    @functools.cached_property
    def autocast(self) -> bool:
        """Whether fp32 weights are copied to 16 bits for every product."""
        return self.recipe.mixed_precision in {"fp16", "bf16"} and not self._engine_casts

    @functools.cached_property
    def _engine_casts(self) -> bool:
        # DeepSpeed and FSDP2 hand the model 16-bit weights; the fp32 ones are theirs.
        return self.strategy.is_sharded and self.recipe.mixed_precision in {"fp16", "bf16"}

    @functools.cached_property
    def pure(self) -> bool:
        """Whether the model itself is in 16 bits."""
        return self.plain_pure or self._engine_casts

    @functools.cached_property
    def plain_pure(self) -> bool:
        """Whether there are no fp32 weights anywhere."""
        return self.recipe.mixed_precision == "pure_bf16"

    @functools.cached_property
    def weight(self) -> int:
        """Of the model's weights and their gradients."""
        return 2 if self.pure else 4

    @functools.cached_property
    def compute(self) -> int:
        """Of what matrix products take and give."""
        return 4 if self.recipe.mixed_precision == "no" else 2

    @functools.cached_property
    def stream(self) -> int:
        """Of the residual stream."""
        return self.weight

    @functools.cached_property
    def dropout_bytes(self) -> int:
        """What dropout keeps of an element: CUDA a byte, a CPU the noise that it multiplied by."""
        if self.recipe.dropout == 0:
            return 0
        return 1 if self.on_gpu else self.compute

    # ---- Sizes.

    @functools.cached_property
    def nd(self) -> int:
        """Elements of one hidden state."""
        return self.tokens * self.model.n_embd

    @functools.cached_property
    def head(self) -> int:
        """Weights of the tied head."""
        return self.model.vocab_size * self.model.n_embd

    @functools.cached_property
    def block_matrices(self) -> int:
        """Weights of a block's four projections."""
        return 12 * self.model.n_embd**2

    @functools.cached_property
    def chunk_logits(self) -> int:
        """Logits of a loss chunk."""
        return min(self.recipe.loss_chunk_tokens, self.tokens) * self.model.vocab_size

    @functools.cached_property
    def full(self) -> bool:
        """Whether every parameter is trained."""
        return self.recipe.finetuning == "full"

    @functools.cached_property
    def checkpointed(self) -> int:
        """How many blocks are checkpointed: the first ones."""
        if not self.recipe.gradient_checkpointing:
            return 0
        return min(self.recipe.checkpointed_layers or self.model.n_layer, self.model.n_layer)

    @functools.cached_property
    def released(self) -> bool:
        """Whether a gradient goes as soon as it is there, its parameter stepped."""
        return self.recipe.release_gradients

    @functools.cached_property
    def adapted(self) -> tuple[str, ...]:
        """The projections that have an adapter."""
        if self.full:
            return ()
        targets = self.recipe.lora_target_modules
        return tuple(
            path
            for path in PROJECTIONS
            if not targets or any(path == t or path.endswith(f".{t}") for t in targets)
        )

    @functools.cached_property
    def trained_shapes(self) -> Shapes:
        """Shapes of the trained tensors, and how many there are of each; the largest first."""
        if self.full:
            return _shapes(
                self.model.n_layer,
                self.model.n_embd,
                self.model.n_positions,
                self.model.vocab_size,
            )
        return _adapter_shapes(
            self.model.n_layer,
            self.model.n_embd,
            self.recipe.lora_rank,
            self.adapted,
            self.recipe.use_dora,
        )

    @functools.cached_property
    def num_trained(self) -> int:
        """Trained parameters."""
        return _count(self.trained_shapes)

    @functools.cached_property
    def num_adapter_parameters(self) -> int:
        """Parameters of the adapters."""
        return 0 if self.full else self.num_trained

    def shard(self, whole: float, *, sharded: bool) -> float:
        """A process's share of something."""
        return whole / self.world_size if sharded else whole


def term(name: str, num_bytes: float, why: str) -> MemoryTerm:
    """Whole bytes, and where they come from."""
    return MemoryTerm(name=name, bytes=round(num_bytes), why=why)


def fullest(candidates: Iterable[list[MemoryTerm]]) -> list[MemoryTerm]:
    """Of moments of one phase the one at which most is held."""
    return max(candidates, key=lambda terms: sum(term.bytes for term in terms))


@functools.cache
def _shapes(n_layer: int, n_embd: int, n_positions: int, vocab_size: int) -> Shapes:
    d = n_embd
    return (
        ((vocab_size, d), 1),
        ((n_positions, d), 1),
        ((d, 4 * d), n_layer),
        ((4 * d, d), n_layer),
        ((d, 3 * d), n_layer),
        ((d, d), n_layer),
        ((4 * d,), n_layer),
        ((3 * d,), n_layer),
        ((d,), 6 * n_layer + 2),
    )


@functools.cache
def _adapter_shapes(
    n_layer: int, n_embd: int, rank: int, adapted: tuple[str, ...], use_dora: bool
) -> Shapes:
    pairs = sorted((PROJECTIONS[path] for path in adapted), key=max, reverse=True)
    matrices = tuple(
        shape
        for inputs, outputs in pairs
        for shape in (
            ((rank, inputs * n_embd), n_layer),
            ((outputs * n_embd, rank), n_layer),
        )
    )
    lengths = tuple(((outputs * n_embd,), n_layer) for _, outputs in pairs)
    return matrices + lengths if use_dora else matrices


@functools.cache
def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) * count for shape, count in shapes)
