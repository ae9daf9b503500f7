"""What the user chose: one flat, frozen recipe, read strictly and written back exactly.

A launched process reads one file, the resolved recipe, which is stored beside the results.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

Init = Literal["pretrained", "scratch"]
# generative: a causal LM per class. masked_lm: a masked LM per class, by pseudo-log-likelihood.
# hybrid: a causal LM per class, trained together with a discriminative term. classification: one
# model with a classification head. unconditional: one causal LM of all text, a base for adapters.
Objective = Literal["generative", "masked_lm", "hybrid", "classification", "unconditional"]
# bf16 and fp16 keep fp32 weights and compute under autocast. pure_bf16: weights, gradients and
# activations are bf16, and no fp32 copy exists; what rounding would lose of an update is kept by
# `bf16_rounding`.
MixedPrecision = Literal["no", "fp16", "bf16", "pure_bf16"]
# How an update reaches a bf16 weight, whose steps of 2^-8 are mostly larger than the update.
# stochastic: up or down by chance, so that the mean is right; no memory. kahan: what did not fit is
# added to the next update; 2 bytes a parameter.
Bf16Rounding = Literal["stochastic", "kahan"]
# lora: adapters on a frozen base. qlora: the same on a base whose linear layers are quantised.
Finetuning = Literal["full", "lora", "qlora"]
# What a quantised base is in. nf4: 4 bits with double quantisation. int8: LLM.int8(), 8 bits.
Quantization = Literal["nf4", "int8"]
# paged: the state lies in memory that the driver moves between the GPU and the host.
Optimizer = Literal["adamw", "adamw_8bit", "adamw_paged", "adamw_8bit_paged", "adafactor"]
Schedule = Literal["cosine", "linear", "constant"]
# How the models of the classes share the machine; auto: as the plan says.
PlacementChoice = Literal["auto", "sequential", "per-gpu", "concurrent", "shared-base"]
# auto: where it is the faster on this device and the model allows it.
Switch = Literal["auto", "on", "off"]
Priors = Literal["training", "uniform"]
# A masked LM's pseudo-log-likelihood. full: every token masked once, alone. shared, independent:
# estimates by random masks, the same for all classes or each class its own.
Pll = Literal["full", "shared", "independent"]

# Tokens, steps, documents: more of them than this is a slip, and not every library counts further.
Count = Annotated[int, Ge(1), Lt(2**31)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecipe:
    """Everything that changes a result, and below it what changes only how the run goes.

    Lengths and batches are in tokens of the model's own tokenizer, BOS and EOS included. Where one
    model is trained per class, `max_steps` and `epochs` are per class.
    """

    # The model.
    model: str = "gpt2"
    init: Init = "pretrained"
    tokenizer: str = "auto"  # auto: the model's own; train: a BPE of the training split; or a path
    tokenizer_vocab_size: Annotated[Count, Ge(258)] = 4096  # read only when tokenizer is "train"
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    fused_gelu: bool = True  # gelu_pytorch_tanh for gelu_new: the same function, fused

    # The data.
    dataset: str = "imdb"
    text_field: str = "auto"
    label_field: str = "auto"
    class_names: tuple[str, ...] = ()  # in label order; empty: from the data set
    train_split: str = "train"
    test_split: str = "test"
    validation_fraction: Annotated[float, Gt(0), Le(0.5)] = 0.1  # of the training split
    validation_documents: Annotated[Count, Ge(2)] = 2000  # at most
    train_documents_per_class: Count | None = None  # at most; None: all
    max_length: Annotated[Count, Ge(3)] = 1024
    priors: Priors = "training"

    # What is trained, and for what.
    objective: Objective = "generative"
    mask_fraction: Annotated[float, Gt(0), Lt(1)] = 0.15  # of the tokens; read by masked_lm
    discriminative_weight: Annotated[float, Ge(0), Le(1)] = 0.2  # GeDi's; read by hybrid
    finetuning: Finetuning = "full"
    lora_rank: Annotated[int, Ge(1), Le(16_384)] = 16
    lora_alpha: Annotated[float, Gt(0)] = 32.0
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    lora_target_modules: tuple[str, ...] = ()  # empty: every linear layer of the blocks
    use_dora: bool = False  # an adapter for the direction of the weights, and their length apart
    quantization: Quantization = "nf4"  # of the base; read by qlora

    # How it is optimized.
    epochs: Annotated[float, Gt(0), Le(100_000)] = 3.0
    max_steps: Count | None = None
    global_batch_tokens: Count | None = 8192  # document tokens, padding not counted
    global_batch_size: Count | None = None  # documents; in place of the tokens
    optimizer: Optimizer = "adamw"
    learning_rate: Annotated[float, Gt(0)] = 5e-5
    min_learning_rate_fraction: Annotated[float, Ge(0), Le(1)] = 0.1
    lr_schedule: Schedule = "cosine"
    warmup_fraction: Annotated[float, Ge(0), Lt(1)] = 0.05
    weight_decay: Annotated[float, Ge(0)] = 0.01
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    adam_beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    adam_epsilon: Annotated[float, Gt(0)] = 1e-8
    max_grad_norm: Annotated[float, Ge(0)] = 1.0  # 0: no clipping
    mixed_precision: MixedPrecision = "no"
    bf16_rounding: Bf16Rounding = "stochastic"  # read by pure_bf16
    tf32: bool = True  # products of 10-bit factors; read by "no" on Ampere and later
    seed: Annotated[int, Ge(0), Lt(2**31)] = 0
    evaluate_every_steps: Count | None = None  # None: at the end of every epoch

    # How the run goes; results change by rounding at most.
    profile: str = "auto"
    placement: PlacementChoice = "auto"  # of one model per class
    micro_batch_tokens: Count = 4096  # that go through at once, padding included
    packing: Switch = "auto"  # rows of whole documents without padding, each sees itself alone
    compile: Switch = "auto"  # torch.compile; auto: where the run is long enough to repay it
    gradient_checkpointing: bool = False
    checkpointed_layers: Count | None = None  # the first so many blocks; None: all
    release_gradients: bool = False  # each as soon as its parameter is stepped: no clipping
    loss_chunk_tokens: Count = 512  # rows of logits that exist at once
    checkpoint_every_steps: Count | None = None  # None: at every evaluation
    keep_checkpoints: Count = 2  # the last N; the best one is kept besides
    log_every_steps: Count = 10
    max_time_seconds: Annotated[float, Gt(0)] | None = None
    price_usd_per_hour: Annotated[float, Ge(0)] | None = None  # of the whole machine
    budget_usd: Annotated[float, Gt(0)] | None = None  # of the whole run; needs the price
    trackers: tuple[str, ...] = ("tensorboard",)


def autocast_precision(mixed_precision: MixedPrecision) -> Literal["no", "fp16", "bf16"]:
    """What Accelerate is told: bf16 weights compute in bf16 without its autocast.

    >>> autocast_precision("pure_bf16"), autocast_precision("bf16")
    ('no', 'bf16')
    """
    return "no" if mixed_precision == "pure_bf16" else mixed_precision


FIELDS: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(TrainRecipe))

# A run may go on with another value of these: nothing but rounding changes.
RUN_FIELDS: frozenset[str] = frozenset(FIELDS[FIELDS.index("profile") :])

# It may also go on with another value of these, and says so: they shape the steps still to come.
# What a run is (data, tokens, model, batches, seed, number of steps) stays, or it is another run.
WARNED_FIELDS: frozenset[str] = frozenset(
    {
        "dropout",
        "lora_dropout",
        "learning_rate",
        "min_learning_rate_fraction",
        "lr_schedule",
        "warmup_fraction",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "mixed_precision",
        "bf16_rounding",
        "tf32",
        "evaluate_every_steps",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Some recipe values and where they come from, for instance `--learning-rate` or a file."""

    origin: str
    values: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRecipe:
    """A recipe, and for each field the origin of its value ("default", a file, an option, ...)."""

    recipe: TrainRecipe
    origins: Mapping[str, str]


def result_differences(old: TrainRecipe, new: TrainRecipe) -> dict[str, tuple[object, object]]:
    """The keys that change the result and have another value: key -> (old, new)."""
    return {
        key: (getattr(old, key), getattr(new, key))
        for key in FIELDS
        if key not in RUN_FIELDS and getattr(old, key) != getattr(new, key)
    }
