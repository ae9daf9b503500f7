"""Configurations in which the closed form of memory and the trace of the step are compared."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from accel_gpt2.catalog.models import MODELS, ModelSpec
from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.plan.memory import MemoryPlan, plan_memory
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.trace.memory import TracedMemory, TraceRequest, trace_all

# What torch's allocator holds and no tensor: a trace does not see it.
_NOT_TRACED = "cuBLAS workspaces"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One configuration by both ways."""

    recipe: TrainRecipe
    request: TraceRequest
    plan: MemoryPlan
    traced: TracedMemory

    @property
    def planned_bytes(self) -> dict[str, int]:
        """By phase, without what a trace does not see."""
        return {
            phase.name: sum(term.bytes for term in phase.terms if term.name != _NOT_TRACED)
            for phase in self.plan.phases
        }

    @property
    def relative_error(self) -> float:
        """Of the peak: positive where the closed form is larger."""
        return max(self.planned_bytes.values()) / self.traced.peak_bytes - 1


# Each choice of these at least once, by hand: the rest is drawn.
_CORNERS: tuple[dict[str, object], ...] = (
    {"mixed_precision": "no", "dropout": 0.1},
    {"mixed_precision": "bf16", "gradient_checkpointing": True, "fused_gelu": False},
    {"mixed_precision": "pure_bf16", "bf16_rounding": "kahan", "tokens": 256},
    {"mixed_precision": "pure_bf16", "optimizer": "adamw_8bit", "gradient_checkpointing": True},
    {"mixed_precision": "fp16", "optimizer": "adafactor", "tokens": 128},
    {"mixed_precision": "bf16", "finetuning": "lora", "lora_dropout": 0.1, "dropout": 0.1},
    {"mixed_precision": "bf16", "finetuning": "lora", "gradient_checkpointing": True},
    {"mixed_precision": "no", "finetuning": "lora", "gradient_checkpointing": True},
    {"mixed_precision": "bf16", "stock_loss": True, "fused_gelu": False, "dropout": 0.1},
    {"mixed_precision": "no", "accumulates": True, "tokens": 512},
)


_CHECKPOINTED: dict[str, object] = {"gradient_checkpointing": True}
_RELEASED: dict[str, object] = {"release_gradients": True, "max_grad_norm": 0.0}
_DORA: dict[str, object] = {"finetuning": "lora", "use_dora": True, "stock_loss": False}

# Choices that the drawn configurations have none of: each changed by hand from a drawn one.
_OPTIONS: tuple[dict[str, object], ...] = (
    {**_CHECKPOINTED, "mixed_precision": "no", "checkpointed_layers": 1},
    {**_CHECKPOINTED, "mixed_precision": "bf16", "checkpointed_layers": 2, "finetuning": "full"},
    {**_CHECKPOINTED, "mixed_precision": "pure_bf16", "checkpointed_layers": 1, "tokens": 4096},
    {**_CHECKPOINTED, "mixed_precision": "bf16", "checkpointed_layers": 2, "finetuning": "lora"},
    {**_RELEASED, "mixed_precision": "no", "finetuning": "full", "stock_loss": False},
    {**_RELEASED, **_CHECKPOINTED, "mixed_precision": "pure_bf16", "finetuning": "full",
     "optimizer": "adamw_8bit", "accumulates": False, "stock_loss": False},
    {**_RELEASED, **_CHECKPOINTED, "mixed_precision": "bf16", "finetuning": "full",
     "checkpointed_layers": 1, "stock_loss": False, "accumulates": True},
    {**_RELEASED, "mixed_precision": "bf16", "optimizer": "adafactor", "stock_loss": False,
     "finetuning": "full", "tokens": 256},
    {**_DORA, "mixed_precision": "no", "tokens": 512, "lora_dropout": 0.0},
    {**_DORA, "mixed_precision": "bf16", "tokens": 4096, "lora_dropout": 0.0},
    {**_DORA, **_CHECKPOINTED, "mixed_precision": "bf16", "tokens": 1024, "lora_dropout": 0.0},
    {**_DORA, **_CHECKPOINTED, "mixed_precision": "pure_bf16", "tokens": 2048,
     "lora_dropout": 0.0},
    {"mixed_precision": "bf16", "optimizer": "adamw_paged", "finetuning": "full"},
    {"mixed_precision": "pure_bf16", "optimizer": "adamw_8bit_paged", "finetuning": "full"},
    {**_DORA, **_CHECKPOINTED, "mixed_precision": "pure_bf16", "tokens": 4096, "dropout": 0.1,
     "lora_dropout": 0.0},
)  # fmt: skip


# Rows that attend in groups, which those of a GPU do with dropout or in fp32.
_PACKED: dict[str, object] = {"packing": "on", "stock_loss": False, "dropout": 0.1}
_ROWS: tuple[dict[str, object], ...] = (
    {**_PACKED, "mixed_precision": "no", "finetuning": "full", "gradient_checkpointing": False},
    {**_PACKED, "mixed_precision": "no", "dropout": 0.0, "tokens": 4096},
    {**_PACKED, "mixed_precision": "bf16", "finetuning": "full", "gradient_checkpointing": False,
     "tokens": 8192},
    {**_PACKED, "mixed_precision": "bf16", "finetuning": "full", "gradient_checkpointing": True},
    {**_PACKED, "mixed_precision": "bf16", "finetuning": "lora", "gradient_checkpointing": False},
    {**_PACKED, "mixed_precision": "fp16", "finetuning": "lora", "gradient_checkpointing": True},
    {**_PACKED, "mixed_precision": "pure_bf16", "finetuning": "full", "tokens": 4096},
    {**_PACKED, "mixed_precision": "bf16", "checkpointed_layers": 1, "gradient_checkpointing": True,
     "finetuning": "full", "tokens": 4096},
)  # fmt: skip


def rows(*, n_layer: int) -> list[tuple[TrainRecipe, TraceRequest]]:
    """The configurations of packed rows."""
    draw = random.Random(7)
    return [_configuration(given, draw, n_layer=n_layer) for given in _ROWS]


def options(*, n_layer: int) -> list[tuple[TrainRecipe, TraceRequest]]:
    """The configurations of options that save memory; all sizes at their real width."""
    draw = random.Random(6)
    return [_configuration(given, draw, n_layer=n_layer) for given in _OPTIONS]


def configurations(count: int, *, n_layer: int) -> list[tuple[TrainRecipe, TraceRequest]]:
    """The corners, and then drawn ones, always the same; all sizes at their real width."""
    draw = random.Random(5)
    found = []
    for number in range(count):
        given = dict(_CORNERS[number]) if number < len(_CORNERS) else {}
        found.append(_configuration(given, draw, n_layer=n_layer))
    return found


_NEVER_DRAWN = ("checkpointed_layers", "release_gradients", "max_grad_norm", "use_dora")


def _configuration(
    given: dict[str, object], draw: random.Random, *, n_layer: int
) -> tuple[TrainRecipe, TraceRequest]:
    def choose(name: str, choices: Sequence[object]) -> object:
        drawn = draw.choice(choices)  # in any case, so that all later draws stay the same
        return given.get(name, drawn)

    name = choose("model", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
    precision = choose("mixed_precision", ["no", "fp16", "bf16", "pure_bf16"])
    length = draw.choice([64, 256, 512, 1024])
    tokens = given.get("tokens", length * draw.choice([1, 1, 2, 4, 8]))
    finetuning = choose("finetuning", ["full", "full", "full", "lora"])
    stock_loss = choose("stock_loss", [False, False, False, finetuning == "full"])
    vocab_size = choose("vocab_size", [50257, 50257, 8192])
    accumulates = choose("accumulates", [False, True])
    assert isinstance(tokens, int)
    recipe = TrainRecipe(
        model=str(name),
        mixed_precision=precision,  # type: ignore[arg-type]
        finetuning=finetuning,  # type: ignore[arg-type]
        lora_rank=draw.choice([4, 16, 64]),
        lora_dropout=choose("lora_dropout", [0.0, 0.0, 0.1]),  # type: ignore[arg-type]
        dropout=choose("dropout", [0.0, 0.1]),  # type: ignore[arg-type]
        fused_gelu=bool(choose("fused_gelu", [True, True, True, False])),
        gradient_checkpointing=bool(choose("gradient_checkpointing", [False, True])),
        optimizer=choose("optimizer", ["adamw", "adamw", "adamw_8bit", "adafactor"]),  # type: ignore[arg-type]
        bf16_rounding=choose("bf16_rounding", ["stochastic", "kahan"]),  # type: ignore[arg-type]
        loss_chunk_tokens=draw.choice([128, 512, 2048]),
        micro_batch_tokens=tokens,
        global_batch_tokens=None,
        global_batch_size=max(1, tokens // min(length, tokens)) * (2 if accumulates else 1),
        packing=given.get("packing", "off"),  # type: ignore[arg-type]
        **{key: given[key] for key in _NEVER_DRAWN if key in given},  # type: ignore[arg-type]
    )
    request = TraceRequest(
        recipe=recipe,
        longest_tokens=min(length, tokens) + 1,
        num_micro_batches=2 if accumulates else 1,
        n_layer=n_layer,
        vocab_size=int(str(vocab_size)),
        stock_loss=bool(stock_loss),
    )
    return recipe, request


def compare(cases: Sequence[tuple[TrainRecipe, TraceRequest]]) -> list[Comparison]:
    """All of them by both ways; the traces come out of one process, or out of its cache."""
    traces = trace_all([request for _, request in cases], timeout_seconds=3600)
    return [
        Comparison(
            recipe=recipe,
            request=request,
            plan=plan_memory(
                recipe,
                _model(request),
                PROFILES["rtx4090"],  # an A100 scores by halves, which no trace does
                STRATEGIES["single"],
                longest_tokens=request.longest_tokens,
                stock_loss=request.stock_loss,
            ),
            traced=traced,
        )
        for (recipe, request), traced in zip(cases, traces, strict=True)
    ]


def _model(request: TraceRequest) -> ModelSpec:
    row = MODELS[request.recipe.model]
    return dataclasses.replace(
        row,
        n_layer=request.n_layer or row.n_layer,
        vocab_size=request.vocab_size or row.vocab_size,
    )
