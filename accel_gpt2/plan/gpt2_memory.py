"""The memory of GPT-2's training step in closed form, phase by phase and term by term.

N are the padded tokens of a micro batch, d is n_embd, L n_layer, V vocab_size, P the number of
trained parameters, C the tokens of a loss chunk. Where a coefficient is counted from the tensors
that autograd saves, the tensors are named; where it was read off traces of the step
(`accel_gpt2.trace`), it says so. docs/decisions/009-memory.md tells how, and
docs/benchmarks/2026-11-23-memory-closed-form.md how far off it is.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.catalog.optimizers import OPTIMIZERS
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.plan.device_memory import StateSizes
from accel_gpt2.plan.memory_types import MemoryPhase, MemoryTerm
from accel_gpt2.recipe import TrainRecipe

# A block's four projections by path, with inputs and outputs in units of d.
PROJECTIONS = {
    "attn.c_attn": (1, 3),
    "attn.c_proj": (1, 1),
    "mlp.c_fc": (1, 4),
    "mlp.c_proj": (4, 1),
}

# NF4 with double quantisation: half a byte a weight, an 8-bit scale for each 64, and an fp32 scale
# of those for each 256 (Dettmers et al. 2023, section 3).
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

# LLM.int8(): a byte a weight, and an fp32 scale for each of the 9 d outputs of a block.
_INT8_SCALES = 4 * 9

# With adapters, what a block has in hand beyond what is saved of it, in bytes an element of the
# hidden state: forward, backward. Read off traces with all four projections adapted: peft's copies
# in the adapter's own type, the product of the second matrix, its multiple, the sum. By compute
# width, autocast, checkpointing, and dropout before the adapter.
_ADAPTER_TRANSIENTS = {
    (4, False, False, False): (20, 32),
    (4, False, False, True): (36, 20),
    (4, False, True, False): (60, 32),
    (4, False, True, True): (60, 36),
    (2, False, False, False): (10, 16),
    (2, False, False, True): (18, 10),
    (2, False, True, False): (30, 16),
    (2, False, True, True): (30, 18),
    (2, True, False, False): (36, 18),
    (2, True, False, True): (48, 26),
    (2, True, True, False): (44, 36),
    (2, True, True, True): (60, 48),
}

# The same on a base in NF4, and taken for one in int8 too: forward, backward; and while a matrix is
# dequantised, which is more where a micro batch is small, besides the 4 d^2 weights of it: forward,
# backward. Read off traces in which a module that allocates what bitsandbytes' Linear4bit does
# stood for it.
_NF4_TRANSIENTS = {
    (4, False, False, False): (36, 32, 8, 16),
    (4, False, False, True): (40, 20, 8, 16),
    (4, False, True, False): (76, 36, 32, 16),
    (4, False, True, True): (76, 36, 32, 16),
    (2, False, False, False): (18, 16, 4, 8),
    (2, False, False, True): (20, 10, 4, 8),
    (2, False, True, False): (38, 18, 16, 8),
    (2, False, True, True): (38, 18, 16, 8),
    (2, True, False, False): (24, 16, 8, 10),
    (2, True, False, True): (22, 10, 8, 10),
    (2, True, True, False): (44, 28, 23, 12),
    (2, True, True, True): (44, 24, 23, 12),
}

# With DoRA, by compute width, autocast and checkpointing: forward, backward; and in an evaluation,
# by the first two. Each is the larger of two sums, in bytes an element of the hidden state and of
# d^2: where a norm is taken there is the adapter's matrix as large as the weights', made from one
# as large as the identity. Read off traces with all four projections adapted.
_DoraBytes = tuple[tuple[float, float], tuple[float, float]]
_DORA_TRANSIENTS: dict[tuple[int, bool, bool], tuple[_DoraBytes, _DoraBytes]] = {
    (4, False, False): (((0, 112.6), (24.5, 57)), ((20, 1), (20, 1))),
    (4, False, True): (((32.6, 80), (108, 16)), ((4, 112.4), (32, 20))),
    (2, False, False): (((0, 56.4), (12.3, 28.4)), ((10, 0.5), (10, 0.5))),
    (2, False, True): (((16.3, 40), (54, 8)), ((2, 56.2), (16, 10))),
    (2, True, False): (((18, 104.5), (44, 49)), ((50, -7.5), (50, -7.5))),
    (2, True, True): (((36, 96), (90, 16)), ((28, 104.3), (46.7, 44.5))),
}
_DORA_EVALUATION: dict[tuple[int, bool], _DoraBytes] = {
    (4, False): ((44, 80), (116, 18.5)),
    (2, False): ((22, 40), (58, 9.3)),
    (2, True): ((44, 100), (98, 21)),
}

Shapes = tuple[tuple[tuple[int, ...], int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpt2Step:
    """One training step of one process.

    `tokens` are those of a micro batch, padding included, and `length` those of its longest
    document that go in. `accumulates` says whether a step has more than one micro batch, so that
    gradients are there while the next one goes through.
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

    # ---- Widths, in bytes an element.

    @property
    def autocast(self) -> bool:
        """Whether fp32 weights are copied to 16 bits for every product."""
        return self.recipe.mixed_precision in {"fp16", "bf16"} and not self._engine_casts

    @property
    def _engine_casts(self) -> bool:
        # DeepSpeed and FSDP2 hand the model 16-bit weights; the fp32 ones are theirs.
        return self.strategy.is_sharded and self.recipe.mixed_precision in {"fp16", "bf16"}

    @property
    def pure(self) -> bool:
        """Whether the model itself is in 16 bits."""
        return self.recipe.mixed_precision == "pure_bf16" or self._engine_casts

    @property
    def weight(self) -> int:
        """Of the model's weights and their gradients."""
        return 2 if self.pure else 4

    @property
    def compute(self) -> int:
        """Of what matrix products take and give."""
        return 4 if self.recipe.mixed_precision == "no" else 2

    @property
    def stream(self) -> int:
        """Of the residual stream."""
        return self.weight

    # ---- Sizes.

    @property
    def nd(self) -> int:
        """Elements of one hidden state."""
        return self.tokens * self.model.n_embd

    @property
    def head(self) -> int:
        """Weights of the tied head."""
        return self.model.vocab_size * self.model.n_embd

    @property
    def block_matrices(self) -> int:
        """Weights of a block's four projections."""
        return 12 * self.model.n_embd**2

    @property
    def chunk_logits(self) -> int:
        """Logits of a loss chunk."""
        return min(self.recipe.loss_chunk_tokens, self.tokens) * self.model.vocab_size

    @property
    def full(self) -> bool:
        """Whether every parameter is trained."""
        return self.recipe.finetuning == "full"

    @property
    def checkpointed(self) -> int:
        """How many blocks are checkpointed: the first ones."""
        if not self.recipe.gradient_checkpointing:
            return 0
        return min(self.recipe.checkpointed_layers or self.model.n_layer, self.model.n_layer)

    @property
    def released(self) -> bool:
        """Whether a gradient goes as soon as it is there, its parameter stepped."""
        return self.recipe.release_gradients

    @property
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

    @property
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

    @property
    def num_trained(self) -> int:
        """Trained parameters."""
        return _count(self.trained_shapes)

    @property
    def num_adapter_parameters(self) -> int:
        """Parameters of the adapters."""
        return 0 if self.full else self.num_trained

    def shard(self, whole: float, *, sharded: bool) -> float:
        """A process's share of something."""
        return whole / self.world_size if sharded else whole

    # ---- What is there all the time.

    def resident(self) -> tuple[MemoryTerm, ...]:
        """Weights, optimizer state, and what else outlives a step."""
        terms = [self._parameters()]
        if not self.full:
            terms.append(
                _term(
                    "adapters",
                    self.num_adapter_parameters * self._adapter_width,
                    f"{self.num_adapter_parameters:,} LoRA weights x {self._adapter_width} bytes",
                )
            )
        terms += self._master_weights()
        terms.append(self._optimizer_state())
        if self.strategy.backend == "ddp":
            terms.append(
                _term(
                    "DDP buckets",
                    self.num_trained * self._trained_width,
                    "a second copy of the gradients, in which they are exchanged",
                )
            )
        if self.strategy.backend == "deepspeed":
            terms.append(self._deepspeed_buckets())
        if self.strategy.offloads_optimizer and self.strategy.zero_stage < 3:
            # stage_1_and_2.py: temp_grad_buffer_for_gpu_offload.
            shape, _ = self.trained_shapes[0]
            terms.append(
                _term(
                    "offload buffer",
                    math.prod(shape) * self.weight,
                    f"the gradient of the largest tensor, {math.prod(shape):,} x {self.weight} "
                    "bytes, on its way to host memory",
                )
            )
        terms.append(
            _term(
                "token ids",
                17 * self.tokens,
                f"{self.tokens:,} tokens x (8 for the input + 8 for the target + 1 byte)",
            )
        )
        return tuple(terms)

    @property
    def _adapter_width(self) -> int:
        return self.weight

    @property
    def _trained_width(self) -> int:
        return self.weight if self.full else self._adapter_width

    def _parameters(self) -> MemoryTerm:
        sharded = self.strategy.shards_parameters
        width = 4 if self.strategy.backend == "fsdp2" and not self._plain_pure else self.weight
        count = self.model.num_parameters
        share = f" / {self.world_size} processes" if sharded else ""
        if self.recipe.finetuning != "qlora":
            if self.strategy.offloads_parameters:
                # deepspeed/runtime/zero/partition_parameters.py: gathered one module at a time.
                return _term(
                    "parameters",
                    width * self.head,
                    f"the largest module, {self.head:,} x {width} bytes; the rest is in host "
                    "memory",
                )
            return _term(
                "parameters",
                self.shard(width * count, sharded=sharded),
                f"{count:,} x {width} bytes{share}",
            )
        quantized = self.model.n_layer * self.block_matrices
        each = _NF4_BYTES
        if self.recipe.quantization == "int8":
            each = 1 + _INT8_SCALES * self.model.n_embd / self.block_matrices
        return _term(
            "parameters",
            quantized * each + (count - quantized) * width,
            f"{quantized:,} in {self.recipe.quantization} x {each:.3f} bytes + the other "
            f"{count - quantized:,} x {width}",
        )

    @property
    def _plain_pure(self) -> bool:
        return self.recipe.mixed_precision == "pure_bf16"

    def _master_weights(self) -> list[MemoryTerm]:
        # deepspeed/runtime/zero/stage_1_and_2.py and stage3.py: single_partition_of_fp32_groups,
        # also where the model is fp32 itself.
        if self.strategy.backend != "deepspeed" or self.strategy.offloads_optimizer:
            return []
        return [
            _term(
                "master weights",
                self.shard(4 * self.num_trained, sharded=True),
                f"{self.num_trained:,} x 4 bytes / {self.world_size} processes, DeepSpeed's own",
            )
        ]

    def _optimizer_state(self) -> MemoryTerm:
        if self.strategy.offloads_optimizer:
            return _term("optimizer state", 0, "in host memory")
        paged = self.paged_bytes()
        total = self.optimizer_state_bytes() - paged
        sharded = self.strategy.shards_optimizer
        share = f" / {self.world_size} processes" if sharded else ""
        why = f"{self.recipe.optimizer}, {self.num_trained:,} parameters{share}"
        if self._kahan:
            why += ", with 2 bytes each of what rounding left over"
        if paged:
            why += "; the rest is paged, and leaves to the host what has no room here"
        elif OPTIMIZERS[self.recipe.optimizer].paged_tensor_elements and not self.on_gpu:
            why += "; without a GPU nothing is paged"
        return _term("optimizer state", self.shard(total, sharded=sharded), why)

    @property
    def _kahan(self) -> bool:
        return self._plain_pure and self.recipe.bf16_rounding == "kahan"

    def optimizer_state_bytes(self) -> float:
        """Of all processes together."""
        spec = OPTIMIZERS[self.recipe.optimizer]
        bf16 = self._plain_pure
        moments = sum(
            spec.state_bytes(shape, bf16=bf16) * count for shape, count in self.trained_shapes
        )
        return moments + (2 * self.num_trained if self._kahan else 0)

    def paged_bytes(self) -> float:
        """Of the optimizer state, what the driver may move to the host."""
        if not self.on_gpu:
            return 0.0
        spec = OPTIMIZERS[self.recipe.optimizer]
        return sum(
            spec.paged_bytes(shape, bf16=self._plain_pure) * count
            for shape, count in self.trained_shapes
        )

    def _deepspeed_buckets(self) -> MemoryTerm:
        # Two, so that one is filled while the other is exchanged: overlap_comm.
        elements = 2 * self.strategy.bucket_elements
        if self.strategy.zero_stage == 3:
            elements += self.strategy.bucket_elements  # stage3_prefetch_bucket_size
        return _term(
            "exchange buckets", elements * self.weight, f"{elements:,} x {self.weight} bytes"
        )

    @property
    def gradient_bytes(self) -> float:
        """Of all trained parameters, as long as a process holds them."""
        width = 4 if self.strategy.backend == "fsdp2" and not self._plain_pure else None
        whole = self.num_trained * (width or self._trained_width)
        return self.shard(whole, sharded=self.strategy.shards_gradients)

    def held_gradients(self) -> list[MemoryTerm]:
        """The gradients of earlier micro batches."""
        if not self.accumulates:
            return []
        return [self.all_gradients("of the step's earlier micro batches")]

    def all_gradients(self, when: str) -> MemoryTerm:
        """The gradients of all trained parameters."""
        return _term("gradients", self.gradient_bytes, f"{self.num_trained:,} parameters, {when}")

    def sizes(self) -> StateSizes:
        """What the training keeps, whole, as it is read and written."""
        trained = self.num_trained * self._trained_width
        whole = self.model.num_parameters * self.weight
        gathered = 0.0
        if self.strategy.is_sharded:
            width = 2 if self._plain_pure else 4
            gathered = self.num_trained * width + self.optimizer_state_bytes()
        return StateSizes(
            parameters_bytes=whole,
            trained_bytes=trained,
            optimizer_bytes=round(self.optimizer_state_bytes()),
            paged_bytes=round(self.paged_bytes()),
            gathered_bytes=round(gathered),
            final_bytes=whole if self.full else trained,
        )

    # ---- Activations.

    @property
    def saved_per_token(self) -> float:
        """Bytes an element of the hidden state that autograd keeps of one block.

        Input and middle of the residual stream; what the four projections take (LayerNorm's
        output, attention's output, LayerNorm's output, GELU's output) as long as a weight of theirs
        is trained; query, key and value; attention's output; what GELU takes; two dropout masks.
        """
        e = self.compute
        fed = {"attn.c_attn": 1, "mlp.c_fc": 1, "mlp.c_proj": 4}
        products = sum(size for path, size in fed.items() if self.full or path in self.adapted)
        saved: float = 2 * self.stream + e * (products + 3 + 1 + 4)
        if not self.recipe.fused_gelu:
            # gelu_new's own intermediate results, four times as wide: x and tanh and 1 + tanh in
            # fp32 under autocast, because pow is.
            saved += 4 * (4 + 4 + 4 if not self.pure else 2 + 2 + 2)
        saved += 2 * self._drop
        if not self.full:
            saved += self._adapter_inputs()
        return saved

    def _adapter_inputs(self) -> float:
        """What adapters keep besides: attention's output as they take it, and dropout's masks."""
        extra = 0.0
        drops = self.recipe.lora_dropout > 0
        quantized = self.recipe.finetuning == "qlora"
        if "attn.c_proj" in self.adapted and (drops or (self.autocast and not quantized)):
            extra += self.compute
        if drops:
            extra += sum(PROJECTIONS[path][0] for path in self.adapted)
        if self.recipe.use_dora:
            # The base's product and the adapter's, which it scales; the former after an fp32 bias.
            width = self.compute + (4 if self.autocast else self.compute)
            extra += width * sum(PROJECTIONS[path][1] for path in self.adapted)
        return extra

    @property
    def _drop(self) -> int:
        """What dropout keeps of an element: CUDA a byte, a CPU the noise that it multiplied by."""
        if self.recipe.dropout == 0:
            return 0
        return 1 if self.on_gpu else self.compute

    @property
    def block_bytes(self) -> float:
        """What autograd keeps of one block, the 16-bit copies of its weights left out.

        Besides `saved_per_token`: mean and deviation of two LayerNorms, attention's log-sum-exp per
        head, and what goes from a LoRA matrix to the other.
        """
        per_token = 16 + 4 * self.model.n_head
        per_token += len(self.adapted) * self.recipe.lora_rank * self.compute
        return self.saved_per_token * self.nd + per_token * self.tokens + self._dropped_attention

    @property
    def _dropped_attention(self) -> float:
        # Without a fused kernel that drops, a CPU keeps probabilities, noise and their product;
        # autocast has them in fp32. Read off traces.
        if self.on_gpu or self.recipe.dropout == 0:
            return 0.0
        each = 13 if self.autocast else 3 * self.compute
        return each * self.model.n_head * self.length * self.tokens

    @property
    def weight_copies(self) -> float:
        """16-bit copies of one block's weights, which its backward pass needs."""
        if not self.autocast:
            return 0.0
        adapters = self.num_adapter_parameters / self.model.n_layer
        # NF4 weights are dequantised anew for every product.
        matrices = 0 if self.recipe.finetuning == "qlora" else self.block_matrices
        return 2.0 * (matrices + adapters)

    @property
    def embedding_bytes(self) -> float:
        """What the first block takes, and the dropout before it."""
        if not self.full and not self.recipe.gradient_checkpointing:
            return -self._not_saved_below_the_first_adapter
        embedded = float(self.stream + self._drop) * self.nd
        if not self.full:
            embedded += self.stream * self.nd  # peft makes the embedding a leaf with a gradient
        return embedded

    @property
    def _not_saved_below_the_first_adapter(self) -> float:
        # What the first block takes needs no gradient, so its first LayerNorm keeps nothing but
        # what the embedding would have kept, and dropout before the first adapter no mask.
        drops = self.recipe.lora_dropout > 0 and "attn.c_attn" in self.adapted
        return 1.0 * self.nd if drops else 0.0

    def activations(self, blocks: int) -> list[MemoryTerm]:
        """What is saved of the embedding and of the first so many blocks."""
        inputs = min(blocks, self.checkpointed)
        whole = blocks - inputs
        terms = []
        embedded = self.embedding_bytes
        if inputs:
            # What the first block takes is in the embedding's. The first whole block's input is
            # besides what that keeps.
            between = inputs - 1 + (whole > 0)
            terms.append(
                _term(
                    "block inputs",
                    embedded + between * self.stream * self.nd,
                    f"{self.stream} bytes x {self.nd:,} for each of {inputs} blocks",
                )
            )
            embedded = 0
        if whole:
            terms.append(
                _term(
                    "saved activations",
                    embedded + whole * self.block_bytes,
                    f"({self.saved_per_token:g} bytes x {self.nd:,} + statistics) for each of "
                    f"{whole} blocks",
                )
            )
            if self.autocast:
                terms.append(self._copies(whole))
        return terms

    def _copies(self, blocks: int) -> MemoryTerm:
        # The first block's frozen c_attn has nothing below it that needs a gradient.
        below = self.recipe.finetuning == "lora" and not self.checkpointed
        unneeded = 2 * 3 * self.model.n_embd**2 if below else 0
        return _term(
            "16-bit copies of weights",
            blocks * self.weight_copies - unneeded,
            f"autocast's, {self.weight_copies:,.0f} bytes for each of {blocks} blocks",
        )

    def forward_copies(self) -> list[MemoryTerm]:
        """Autocast's copies that live until the forward pass ends, saved or not."""
        if not self.autocast:
            return []
        biases = 2 * 9 * self.model.n_embd if self.full else 0
        adapters = self.num_adapter_parameters / self.model.n_layer
        # Frozen weights are not remembered; what is saved is not counted twice.
        trained = 2 * (self.block_matrices if self.full else adapters)
        return [
            _term(
                "autocast's cache",
                biases * self.model.n_layer + trained * self.checkpointed,
                "16-bit copies of trained weights, until the forward pass ends",
            )
        ]

    def gathered(self, *, blocks: int) -> list[MemoryTerm]:
        """Whole weights of the units in use, where each process has a share only."""
        if not self.strategy.shards_parameters:
            return []
        d = self.model.n_embd
        root = self.head + self.model.n_positions * d + 2 * d
        elements = root + blocks * (self.block_matrices + 13 * d)
        return [
            _term(
                "gathered weights",
                elements * self.compute,
                f"embeddings, head and {blocks} blocks, {elements:,} x {self.compute} bytes",
            )
        ]

    def _exchanged(self, *, blocks: int) -> list[MemoryTerm]:
        """FSDP2's whole gradients of a block, or of what is none, on their way into shares."""
        if self.strategy.backend != "fsdp2" or not self.full:
            return []
        d = self.model.n_embd
        elements = blocks * (self.block_matrices + 13 * d)
        if not blocks:
            elements = self.head + self.model.n_positions * d + 2 * d
        width = (
            2 if self._plain_pure else 4
        )  # fsdp/_fully_shard/_fsdp_collectives.py, foreach_reduce
        return [_term("exchanged gradients", elements * width, f"{elements:,} x {width} bytes")]

    # ---- The phases.

    def phases(self) -> tuple[MemoryPhase, ...]:
        """All of them, in the order of a step."""
        resident = self.resident()
        phases = {
            "forward": self._forward(),
            "loss backward": self._loss(),
            "block backward": self._blocks(),
            "embedding backward": self._embedding(),
            "optimizer step": self._optimizer(),
            "evaluation": self._evaluation(),
            "checkpoint saving": self._saving(),
        }
        return tuple(
            MemoryPhase(name=name, terms=tuple(term for term in (*resident, *own) if term.bytes))
            for name, own in phases.items()
            if own
        )

    def _outputs(self) -> list[MemoryTerm]:
        if not self.stock_loss:
            return []
        width = 2 if self.pure else 4
        logits = self.tokens * self.model.vocab_size
        return [
            _term(
                "outputs kept", width * logits, f"{logits:,} logits x {width} bytes, in `outputs`"
            )
        ]

    def _forward(self) -> list[MemoryTerm]:
        return [
            *self.held_gradients(),
            *_fullest(
                [
                    *self.activations(blocks),
                    _term(
                        "forward of a block",
                        self._forward_transient(checkpointed=blocks <= self.checkpointed)
                        + self.length * self.model.n_embd * self.weight,
                        "what the last block has in hand, and the embeddings",
                    ),
                ]
                for blocks in {self.model.n_layer, self.checkpointed} - {0}
            ),
            *self.forward_copies(),
            *self.gathered(blocks=2),
            *self._outputs(),
        ]

    def _forward_transient(self, *, checkpointed: bool) -> float:
        # Read off traces. Without checkpointing all but the sum of the residual is saved anyway.
        if not self.full:
            return self._adapter_transients(checkpointed=checkpointed)[0]
        if checkpointed:
            return {4: 48, 2: 30 if self.autocast else 24}[self.compute] * self.nd
        return 3 * self.stream * self.nd

    def _loss(self) -> list[MemoryTerm]:
        """The loss at its fullest, forward or backward; ours makes its gradients in the former."""
        fuller = _fullest(self._stock_losses() if self.stock_loss else self._losses())
        return [
            *self.held_gradients(),
            *self.activations(self.model.n_layer),
            *self.gathered(blocks=1),
            *self._outputs(),
            _term(
                "last block's output",
                self.stream * self.nd if self.checkpointed == self.model.n_layer else 0,
                f"{self.stream} bytes x {self.nd:,}, the last LayerNorm's input",
            ),
            *fuller,
        ]

    def _losses(self) -> list[list[MemoryTerm]]:
        # Autocast's copy of a chunk's rows, and their gradient, unless the peak is at the head's.
        width = 2 if self.autocast else 0
        width += 0 if self.full and self.compute == 2 else self.compute
        rows = width * min(self.recipe.loss_chunk_tokens, self.tokens) * self.model.n_embd
        return [
            [
                *self.forward_copies(),
                *self._chunk(),
                _term(
                    "hidden states and their gradient",
                    2 * self.stream * self.nd + 32 * self.tokens + rows,
                    f"2 x {self.stream} bytes x {self.nd:,}, a chunk's rows, indices",
                ),
            ],
            [
                *self._head_gradient(),
                _term(
                    "hidden states and their gradient",
                    3 * self.stream * self.nd,
                    f"3 x {self.stream} bytes x {self.nd:,}",
                ),
            ],
        ]

    def _stock_losses(self) -> list[list[MemoryTerm]]:
        """transformers' loss forward (logits, a copy in fp32, log-softmax), and backward
        (log-softmax and two gradients)."""
        logits = self.tokens * self.model.vocab_size
        forward = 8 if self.compute == 4 else 10
        hidden = _term(
            "hidden states",
            self.compute * self.nd,
            f"{self.compute} bytes x {self.nd:,}, the head's",
        )
        return [
            [
                hidden,
                *self.forward_copies(),
                _term("logits", forward * logits, f"{logits:,} x {forward} bytes"),
                *self._head_copy(),
            ],
            [hidden, _term("logits", 12 * logits, f"{logits:,} x 12 bytes"), *self._head_copy()],
        ]

    def _head_copy(self) -> list[MemoryTerm]:
        return [
            _term(
                "16-bit copy of the head",
                2 * self.head if self.autocast else 0,
                f"{self.head:,} x 2 bytes",
            )
        ]

    def _head_gradient(self) -> list[MemoryTerm]:
        return [
            _term(
                "head gradient",
                self.head * self.weight if self.full else 0,
                f"{self.head:,} x {self.weight} bytes, held until the embedding's is added",
            )
        ]

    def _chunk(self) -> list[MemoryTerm]:
        """A chunk's logits, their error beside them where it is narrower, and its product."""
        width = 4 + (2 if self.compute == 2 else 0)
        product = 2 * self.head if self.compute == 2 and self.full else 0
        return [
            _term(
                "logits of a chunk",
                width * self.chunk_logits + product,
                f"{self.chunk_logits:,} logits x {width} bytes, and {product:,} for the product of "
                "their error with the hidden states",
            ),
            _term(
                "fp32 head gradient",
                4 * self.head if self.full else 0,
                f"{self.head:,} x 4 bytes, a sum over the chunks",
            ),
            *self._head_copy(),
        ]

    def _blocks(self) -> list[MemoryTerm]:
        """Backward through the block at which most is held: the last or the first of its kind."""
        layers, checkpointed = self.model.n_layer, self.checkpointed
        fuller = _fullest(
            [
                *self._block_gradients(layers - blocks),
                *self.activations(blocks),
                *(self._recomputed() if blocks <= checkpointed else []),
                self._backward_transient(checkpointed=blocks <= checkpointed),
            ]
            for blocks in sorted({layers, checkpointed + 1, checkpointed, 1}, reverse=True)
            if 1 <= blocks <= layers
        )
        return [
            *fuller,
            *self.gathered(blocks=2),
            *self._exchanged(blocks=1),
            *self._head_gradient(),
            *self._outputs(),
        ]

    def _block_gradients(self, blocks_done: int) -> list[MemoryTerm]:
        if self.accumulates:
            return self.held_gradients()
        if self.released:
            return []
        share = blocks_done / self.model.n_layer
        per_block = (
            self.block_matrices + 13 * self.model.n_embd
            if self.full
            else self.num_trained / self.model.n_layer
        )
        whole = self.gradient_bytes / max(1, self.num_trained) * per_block * self.model.n_layer
        return [_term("gradients", share * whole, f"of the {blocks_done} blocks that are done")]

    def _recomputed(self) -> list[MemoryTerm]:
        # Read off traces: the recomputation stops before gelu_new's result is cast to 16 bits.
        uncast = 8 if self.autocast and not self.recipe.fused_gelu else 0
        return [
            _term(
                "recomputed block",
                self.block_bytes - uncast * self.nd + self.weight_copies,
                f"{self.saved_per_token - uncast:g} bytes x {self.nd:,}, statistics, 16-bit "
                "weights",
            )
        ]

    def _backward_transient(self, *, checkpointed: bool) -> MemoryTerm:
        e, drop = self.compute, self._drop
        if not self.full:
            needed = self._adapter_transients(checkpointed=checkpointed)[1]
            return _term(
                "backward of a block", needed, f"{needed / self.nd:.3g} bytes x {self.nd:,}"
            )
        copy = e if self.autocast or drop else 0  # autocast's, or dropout's
        if self.recipe.fused_gelu:
            # At the block's last product: the gradient that came, its copy, and that of GELU's
            # output; the block's own output is gone.
            per_token = copy + 4 * e - drop
        else:
            # Read off traces: within gelu_new, when that gradient has gone where it is added.
            per_token = {4: 32, 2: 48 if self.autocast else 16}[e] - drop
        weights = 4 * e  # the gradient of that product's matrix
        if not self.recipe.fused_gelu and self.accumulates:
            weights -= 4 * self.weight
        needed = per_token * self.nd + weights * self.model.n_embd**2
        if self.released:  # that gradient as wide as the weights, while they are stepped
            stepped = 4 * (self._step_bytes + (0 if self.accumulates else self.weight))
            needed = max(needed, copy * self.nd + stepped * self.model.n_embd**2)
        if checkpointed:
            # At the end of the recomputation: the gradient, the product, dropout's result, the sum.
            again = self.stream + e + self.stream + (e if drop else 0)
            needed = max(needed, again * self.nd)
        return _term(
            "backward of a block",
            needed,
            f"{per_token} bytes x {self.nd:,} + {weights} bytes x {self.model.n_embd**2:,}",
        )

    def _adapter_transients(self, *, checkpointed: bool) -> tuple[float, float]:
        """In the forward and the backward pass of a block, in bytes."""
        recipe, drop = self.recipe, self._drop
        key = self.compute, self.autocast, checkpointed, recipe.lora_dropout > 0
        # Under checkpointing and autocast the peak is where a mask is made, otherwise where it has
        # been used, or before.
        forward_drop = 0 if checkpointed else -drop
        backward_drop = drop if checkpointed and self.autocast else -drop
        if recipe.use_dora:
            transients = _DORA_TRANSIENTS[self.compute, self.autocast, checkpointed]
            dequantised = 4 * self.model.n_embd**2 * self.compute
            matrix = dequantised if recipe.finetuning == "qlora" else 0
            return (
                self._dora_bytes(transients[0]) + forward_drop * self.nd + matrix,
                self._dora_bytes(transients[1]) + backward_drop * self.nd + matrix,
            )
        if recipe.finetuning == "lora":
            forward, backward = _ADAPTER_TRANSIENTS[key]
            return (forward + forward_drop) * self.nd, (backward + backward_drop) * self.nd
        forward, backward, forward_with_matrix, backward_with_matrix = _NF4_TRANSIENTS[key]
        matrix = 4 * self.model.n_embd**2 * self.compute
        return (
            max((forward + forward_drop) * self.nd, forward_with_matrix * self.nd + matrix),
            max((backward - drop) * self.nd, backward_with_matrix * self.nd + matrix),
        )

    def _dora_bytes(self, alternatives: _DoraBytes) -> float:
        return max(each * self.nd + more * self.model.n_embd**2 for each, more in alternatives)

    def _embedding(self) -> list[MemoryTerm]:
        if not self.full:
            if not self.recipe.gradient_checkpointing:
                return []  # no gradient comes so far
            return [
                *([] if self.released else [self.all_gradients("all that the step makes")]),
                _term(
                    "gradient of the input",
                    3 * self.stream * self.nd,
                    f"{self.nd:,} x {self.stream} bytes, the embedding and its gradient beside it",
                ),
            ]
        sums = "the head's, and the embedding's to be added to it"
        if self.released:
            return self._released_embedding(sums)
        return [
            self.all_gradients("all that the step makes"),
            *self.gathered(blocks=0),
            *self._exchanged(blocks=0),
            *self._outputs(),
            _term(
                "embedding gradient",
                (2 if self.accumulates else 1) * self.head * self.weight,
                f"{self.head:,} x {self.weight} bytes, {sums}",
            ),
            _term("gradient of the input", self.stream * self.nd, f"{self.nd:,} x {self.stream}"),
        ]

    def _released_embedding(self, sums: str) -> list[MemoryTerm]:
        step = self.weight + self._step_bytes
        width = 2 * self.weight
        largest = max(width * self.head + self.stream * self.nd, step * self.head)
        return [
            # Of a micro batch before the last one, after which they are kept.
            *self.held_gradients(),
            *self._outputs(),
            _term(
                "embedding gradient",
                largest,
                f"{self.head:,} x {width} bytes, {sums}; or {step:g} while it is stepped",
            ),
        ]

    @property
    def _step_bytes(self) -> float:
        """An optimizer's temporaries over one tensor, per element."""
        spec = OPTIMIZERS[self.recipe.optimizer]
        if self._plain_pure:
            return spec.bf16_step_bytes_per_parameter
        return spec.step_bytes_per_parameter

    def _optimizer(self) -> list[MemoryTerm]:
        if self.released:  # in the backward pass
            return []
        sizes = sorted((math.prod(shape) for shape, _ in self.trained_shapes), reverse=True)
        following = sizes[:2]
        if self.full:  # in the model's order
            embeddings = [self.head, self.model.n_positions * self.model.n_embd]
            feed_forward = 2 * [4 * self.model.n_embd**2]
            following = max(embeddings, feed_forward, key=sum)
        # One tensor's are let go when the next one's are there.
        temporaries = self._step_bytes * (sizes[0] if self._plain_pure else sum(following))
        if self.strategy.backend == "deepspeed":
            # stage_1_and_2.py and stage3.py, step: the share's gradients in fp32.
            temporaries += 4 * self.num_trained / self.world_size
        return [
            self.all_gradients("of the step"),
            *self._outputs(),
            _term(
                "optimizer temporaries",
                0 if self.strategy.offloads_optimizer else temporaries,
                f"{self.recipe.optimizer} over the largest of {self.num_trained:,} parameters",
            ),
        ]

    def _evaluation(self) -> list[MemoryTerm]:
        width = self.stream
        # Read off traces: the products' cache, and what a block has in hand.
        kind = (self.compute, self.autocast)
        per_token = {(4, False): 56, (2, True): 32, (2, False): 28}[kind]
        if not self.full:
            per_token = {(4, False): 72, (2, True): 53, (2, False): 36}[kind]
        cache = (
            (2 * self.block_matrices + 2 * 9 * self.model.n_embd) * self.model.n_layer
            if self.autocast and self.full
            else 0
        )
        rows = min(self.recipe.loss_chunk_tokens, self.tokens) * self.model.n_embd
        head = 4 * (self.head + rows) if width == 2 else 0
        scoring = head + 4 * self.chunk_logits + width * self.nd
        in_blocks = float(per_token * self.nd)
        if self.recipe.use_dora:
            in_blocks = self._dora_bytes(_DORA_EVALUATION[kind])
        return [
            *self._gathered_to_score(),
            *self._outputs(),
            _term("autocast's cache", cache, "16-bit copies that live until the forward pass ends"),
            _term(
                "scoring",
                max(scoring, in_blocks),
                "a chunk's fp32 logits and an fp32 head, or what a block has in hand",
            ),
        ]

    def _gathered_to_score(self) -> list[MemoryTerm]:
        if self.strategy.zero_stage < 3:
            return self.gathered(blocks=2)
        count = self.model.num_parameters
        return [
            _term(
                "gathered weights",
                count * self.weight,
                f"{count:,} x {self.weight} bytes: while documents are scored, ZeRO-3's weights "
                "are whole on every process",
            )
        ]

    def _saving(self) -> list[MemoryTerm]:
        copy = 0 if self.on_gpu else self.num_trained * self._trained_width
        return [
            *self._outputs(),
            _term("copies of the weights", copy, "safetensors writes a file from its own copies"),
        ]


def _fullest(candidates: Iterable[list[MemoryTerm]]) -> list[MemoryTerm]:
    return max(candidates, key=lambda terms: sum(term.bytes for term in terms))


def _term(name: str, num_bytes: float, why: str) -> MemoryTerm:
    return MemoryTerm(name=name, bytes=round(num_bytes), why=why)


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
