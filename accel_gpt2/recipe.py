"""What the user chose: one flat, frozen recipe, read strictly and written back exactly.

A launched process reads one file, the resolved recipe, which is stored beside the results.
"""

import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import re
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from accel_gpt2.catalog.models import MODELS, ModelSpec
from accel_gpt2.errors import UsageError, nearest
from accel_gpt2.units import format_bytes

if TYPE_CHECKING:
    import yaml
    from pydantic import TypeAdapter

ENVIRONMENT_PREFIX = "ACCEL_GPT2_"

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


# Random weights want a far larger learning rate than published ones: GPT-3's for 125M parameters
# (Brown et al. 2020, table 2.1), and its weight decay.
_SCRATCH_DEFAULTS = types.MappingProxyType({"learning_rate": 6e-4, "weight_decay": 0.1})

# So do adapters, which start at zero: that of LoRA's own GPT-2 runs (Hu et al. 2021, table 11).
_LORA_DEFAULTS = types.MappingProxyType({"learning_rate": 2e-4})


def resolve(layers: Sequence[Layer]) -> ResolvedRecipe:
    """Lay values over one another, later layers first in right, and check the outcome.

    Between the defaults and `layers` stands what random weights or adapters want, where they are
    chosen, and what the model's catalog row says. All problems are reported at once.

    Raises:
        UsageError: for unknown keys, values of a wrong type or range, and contradictions.

    >>> resolved = resolve([Layer(origin="--model", values={"model": "gpt2-tiny"})])
    >>> resolved.recipe.init, resolved.origins["init"], resolved.origins["seed"]
    ('scratch', 'model gpt2-tiny', 'default')
    """
    problems: list[str] = []
    for layer in layers:
        problems += [f"{layer.origin}: {text}" for text in _unknown_keys(layer.values)]

    model = next((x.values["model"] for x in reversed(layers) if "model" in x.values), None)
    model = TrainRecipe().model if model is None else model
    row = MODELS.get(model) if isinstance(model, str) else None
    rows = [] if row is None else [Layer(origin=f"model {model}", values=row.recipe_defaults)]
    chosen = {key: value for x in [*rows, *layers] for key, value in x.values.items()}
    if chosen.get("finetuning") in ("lora", "qlora"):
        origin = f"finetuning {chosen['finetuning']}"
        rows.insert(0, Layer(origin=origin, values=_LORA_DEFAULTS))
    if chosen.get("init") == "scratch":
        rows.insert(0, Layer(origin="init scratch", values=_SCRATCH_DEFAULTS))

    values: dict[str, object] = dataclasses.asdict(TrainRecipe())
    origins = dict.fromkeys(FIELDS, "default")
    for layer in [*rows, *layers]:
        given = {key: value for key, value in layer.values.items() if key in FIELDS}
        batch_keys = [k for k in ("global_batch_tokens", "global_batch_size") if given.get(k)]
        if len(batch_keys) == 2:
            problems.append(
                f"{layer.origin}: global_batch_tokens and global_batch_size are both given; "
                "give one of them."
            )
        elif batch_keys:
            other = {"global_batch_tokens", "global_batch_size"} - set(batch_keys)
            given[other.pop()] = None
        values.update(given)
        origins.update(dict.fromkeys(given, layer.origin))
    recipe, more = _validated(values, origins)
    if recipe is None or problems:
        raise UsageError("\n".join([*problems, *more]))
    return ResolvedRecipe(recipe=recipe, origins=origins)


def _unknown_keys(values: Mapping[str, object]) -> list[str]:
    return [
        f"{key!r} is not a recipe key.{nearest(str(key), FIELDS)}"
        for key in values
        if key not in FIELDS
    ]


def _validated(
    values: Mapping[str, object], origins: Mapping[str, str]
) -> tuple[TrainRecipe | None, list[str]]:
    unreadable = [
        f"{key} = {value!r} (from {origins[key]}): it holds a character that no name has; leave "
        "out NUL and bytes that are not UTF-8."
        for key, value in values.items()
        if _NO_TEXT.search("".join(_strings(value)))
    ]
    if unreadable:
        return None, unreadable
    read: dict[str, Any] = dict(values)
    problems: list[str] = []
    # Defaults are as they should be; to make a reader for each would take longer than to plan.
    for key, value in values.items():
        if origins[key] != "default" and not _is_plain(_kinds()[key], value):
            read[key], complaints = _strictly_read(key, value, origins)
            problems += complaints
    if problems:
        return None, problems
    recipe = TrainRecipe(**read)
    problems = _contradictions(recipe)
    return (None if problems else recipe), problems


# NUL ends a path, and lone surrogates stand for bytes that are not UTF-8.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(_strings(part) for part in value.items())
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(_strings(part) for part in value)


_LONGEST_NAME = 4096  # of a path, on most systems

_LIMITS = types.MappingProxyType(
    {Ge: operator.ge, Gt: operator.gt, Le: operator.le, Lt: operator.lt}
)


def _is_plain(kind: Any, value: object) -> bool:
    """Whether a value is right and needs no reader, which takes longer to load than a plan does to
    make: any text, a switch, a choice's word, a number within its limits.
    """
    match typing.get_origin(kind):
        case typing.Literal:
            return isinstance(value, str) and value in typing.get_args(kind)
        case types.UnionType | typing.Union:
            return any(_is_plain(part, value) for part in typing.get_args(kind))
        case typing.Annotated:
            bare, *limits = typing.get_args(kind)
            return _is_plain(bare, value) and all(_is_within(limit, value) for limit in limits)
    if kind is float:
        return type(value) is float and math.isfinite(value)
    return kind in (str, bool, int, types.NoneType) and type(value) is kind


def _is_within(limit: Any, value: Any) -> bool:
    (bound,) = dataclasses.astuple(limit)
    return bool(_LIMITS[type(limit)](value, bound))


def _strictly_read(key: str, value: object, origins: Mapping[str, str]) -> tuple[object, list[str]]:
    from pydantic import ValidationError

    try:
        # As JSON, because only there strict reading takes a list for a tuple.
        return _strict_reader(key).validate_json(json.dumps(value)), []
    except ValidationError as error:
        return None, [_sentence(key, dict(problem), origins) for problem in error.errors()]


@functools.cache
def _kinds() -> Mapping[str, Any]:
    return typing.get_type_hints(TrainRecipe, include_extras=True)


@functools.cache
def _strict_reader(key: str) -> "TypeAdapter[Any]":
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(_kinds()[key], config=ConfigDict(strict=True, allow_inf_nan=False))


def _sentence(key: str, problem: dict[str, Any], origins: Mapping[str, str]) -> str:
    need = problem["msg"].replace("Input should be", "it should be").rstrip(".")
    return f"{key} = {problem['input']!r} (from {origins.get(key, 'the file')}): {need}."


def _contradictions(recipe: TrainRecipe) -> list[str]:
    problems = []
    for key in ("model", "tokenizer", "dataset", "train_split", "test_split", "profile"):
        name = getattr(recipe, key)
        if not name.strip():
            problems.append(f"{key} = {name!r}: a name is needed here.")
        if len(name) > _LONGEST_NAME:
            problems.append(
                f"{key} = '{name[:40]}...': no name and no path has {len(name):,} characters."
            )
    if recipe.global_batch_tokens is None and recipe.global_batch_size is None:
        problems.append("global_batch_tokens and global_batch_size are both empty; give one.")
    row = MODELS.get(recipe.model)
    if row is not None and recipe.max_length > row.n_positions:
        problems.append(
            f"max_length = {recipe.max_length}: {row.name} has {row.n_positions} positions; "
            f"give --max-length {row.n_positions} or less."
        )
    if row is not None and row.hub_id is None and recipe.init == "pretrained":
        problems.append(
            f"init = 'pretrained': {row.name} has no pretrained weights; give --init scratch."
        )
    if recipe.tokenizer == "train" and recipe.init == "pretrained":
        problems.append(
            "tokenizer = 'train' with init = 'pretrained': pretrained weights know only their own "
            "tokens; give --init scratch, or --set tokenizer=auto."
        )
    if recipe.finetuning != "full" and recipe.init == "scratch":
        problems.append(
            f"finetuning = {recipe.finetuning!r} with init = 'scratch': an adapter on random "
            "weights learns next to nothing; give --finetuning full, or a pretrained model."
        )
    if row is not None:
        problems += _unfit_objective(recipe, row)
    if recipe.objective == "hybrid" and recipe.finetuning != "full":
        problems.append(
            f"objective = 'hybrid' with finetuning = {recipe.finetuning!r}: the classes' models "
            "are trained whole, side by side; give --finetuning full, or objective=generative."
        )
    problems += _without_effect(recipe, row) + _unreleasable(recipe)
    if recipe.bf16_rounding == "kahan" and recipe.mixed_precision != "pure_bf16":
        problems.append(
            f"bf16_rounding = 'kahan' with mixed_precision = {recipe.mixed_precision!r}: only bf16 "
            "weights are rounded; give --mixed-precision pure_bf16, or leave the rounding out."
        )
    if recipe.budget_usd is not None and not recipe.price_usd_per_hour:
        price = "no price_usd_per_hour" if recipe.price_usd_per_hour is None else "a price of 0"
        problems.append(
            f"budget_usd = {recipe.budget_usd:g} with {price}: a budget is reached at a price; "
            "give --set price_usd_per_hour=... (what the whole machine costs), or leave the budget "
            "out and give --max-time."
        )
    return problems


def _without_effect(recipe: TrainRecipe, row: ModelSpec | None) -> list[str]:
    """Choices that nothing would read."""
    problems = []
    if recipe.use_dora and recipe.finetuning == "full":
        problems.append(
            "use_dora = True with finetuning = 'full': DoRA is a kind of adapter; give "
            "--finetuning lora or qlora, or leave use_dora out."
        )
    on_conv1d = row is not None and row.model_type == "gpt2" and recipe.finetuning == "lora"
    if recipe.use_dora and recipe.lora_dropout > 0 and on_conv1d:
        problems.append(dora_dropout_problem(recipe))
    if recipe.quantization != "nf4" and recipe.finetuning != "qlora":
        problems.append(
            f"quantization = {recipe.quantization!r} with finetuning = {recipe.finetuning!r}: only "
            "a frozen base is quantised; give --finetuning qlora, or leave the quantization out."
        )
    if recipe.packing == "on" and recipe.objective not in {"generative", "unconditional"}:
        problems.append(
            f"packing = 'on' with objective = {recipe.objective!r}: only one language model at a "
            "time reads packed rows; give --set packing=off, or leave it out."
        )
    if recipe.checkpointed_layers is None:
        return problems
    if not recipe.gradient_checkpointing:
        problems.append(
            f"checkpointed_layers = {recipe.checkpointed_layers} without gradient_checkpointing: "
            "give --gradient-checkpointing, or leave the number out."
        )
    if row is not None and recipe.checkpointed_layers > row.n_layer:
        problems.append(
            f"checkpointed_layers = {recipe.checkpointed_layers}: {row.name} has {row.n_layer} "
            f"blocks; give --set checkpointed_layers={row.n_layer} or less, or leave it out for "
            "all."
        )
    return problems


def dora_dropout_problem(recipe: TrainRecipe) -> str:
    """What DoRA under dropout would cost on GPT-2's transposed layers, and what to type.

    peft 0.21, utils/other.py: `transpose` makes the frozen weights a new parameter, which takes a
    gradient.
    """
    return (
        f"use_dora = True with lora_dropout = {recipe.lora_dropout:g} on a GPT-2: peft would make "
        "gradients of all frozen weights too; give --set lora_dropout=0, or leave use_dora out."
    )


def _unreleasable(recipe: TrainRecipe) -> list[str]:
    """What needs all gradients of a step at the same time."""
    if not recipe.release_gradients:
        return []
    problems = []
    if recipe.max_grad_norm > 0:
        problems.append(
            f"release_gradients with max_grad_norm = {recipe.max_grad_norm:g}: a global norm "
            "needs all gradients at once; give --set max_grad_norm=0, or leave release_gradients "
            "out."
        )
    if recipe.mixed_precision == "fp16":
        problems.append(
            "release_gradients with mixed_precision = 'fp16': whether the loss scale overflowed "
            "is known when all gradients are there; give --mixed-precision bf16 or no."
        )
    tokens = recipe.global_batch_tokens
    if recipe.global_batch_size is not None:  # documents of the full length, if they must be cut
        tokens = recipe.global_batch_size * (recipe.max_length - 1)
        tokens = 0 if recipe.global_batch_size == 1 else tokens
    if (tokens or 0) > recipe.micro_batch_tokens:
        problems.append(
            f"release_gradients with micro batches of {recipe.micro_batch_tokens:,} tokens of a "
            f"global batch of {tokens:,}: gradients are kept from one micro batch to the next, so "
            "nothing is released; give --set micro_batch_tokens="
            f"{tokens}, or a smaller global batch."
        )
    return problems


def _unfit_objective(recipe: TrainRecipe, row: ModelSpec) -> list[str]:
    encoder = row.model_type == "roberta"
    if encoder and recipe.objective in {"generative", "hybrid", "unconditional"}:
        return [
            f"objective = {recipe.objective!r}: {row.name} sees a token's right side too, so it "
            "gives no likelihood from left to right; give --set objective=masked_lm or "
            "objective=classification, or a GPT-2 model."
        ]
    if not encoder and recipe.objective == "masked_lm":
        return [
            f"objective = 'masked_lm': {row.name} has no mask token and sees the left side only; "
            "give --model roberta-base (or roberta-tiny, from scratch), or objective=generative."
        ]
    return []


_LARGEST_RECIPE_BYTES = 2**20
_DEEPEST_RECIPE = 8  # a list in a mapping is all that it needs


def read_layer(path: Path) -> Layer:
    """The values of a recipe file, YAML or JSON by its suffix; every key may be left out.

    Raises:
        UsageError: when the file is missing, is not text, does not parse or is not one mapping.
    """
    if not os.path.isfile(path):  # a pipe without a writer would be waited for
        there = "is not a file" if os.path.exists(path) else "does not exist"
        raise UsageError(f"The recipe {path} {there}.")
    try:
        if path.stat().st_size > _LARGEST_RECIPE_BYTES:
            raise UsageError(
                f"The recipe {path} has {format_bytes(path.stat().st_size)}; a recipe is some "
                "lines of `key: value`."
            )
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"The recipe {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The recipe {path} is not UTF-8 text (byte {error.start}); a recipe is some lines of "
            "`key: value`."
        ) from None
    return Layer(origin=str(path), values=_parse_mapping(text, path))


def _parse_mapping(text: str, path: Path) -> dict[str, object]:
    parse = _parse_json if path.suffix == ".json" else _parse_yaml
    try:
        content = parse(text)
    except RecursionError:
        raise UsageError(f"The recipe {path} is nested too deep; it should be flat.") from None
    except ValueError as error:
        kind = "JSON" if parse is _parse_json else "YAML"
        raise UsageError(f"The recipe {path} is not {kind} that can be read: {error}.") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(
            f"The recipe {path} holds a {type(content).__name__}; it should hold lines of "
            "`key: value`."
        )
    # To YAML 1.1 an unquoted `mixed_precision: no` and `packing: on` are booleans.
    if content.get("mixed_precision") is False:
        content["mixed_precision"] = "no"
    for key in ("packing", "compile"):
        if isinstance(content.get(key), bool):
            content[key] = "on" if content[key] else "off"
    return {str(key): _number(str(key), value) for key, value in content.items()}


def _number(key: str, value: object) -> object:
    # To YAML 1.1 a number such as 5e-5, without a point, is text.
    exponent = isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+[eE][-+]?[0-9]+", value)
    return parse_value(key, str(value)) if exponent else value


def _parse_json(text: str) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        _require_unique([key for key, _ in pairs])
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def _require_unique(keys: Sequence[object]) -> None:
    seen: set[object] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"the key {key!r} stands there twice")
        seen.add(key)


def _parse_yaml(text: str) -> object:
    """Plain YAML: scalars, lists and mappings, nothing that refers to anything.

    Raises:
        ValueError: with the reason, for what is no YAML and for what has no place in a recipe.
    """
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # A few lines of aliases of aliases are more values than a memory holds, and a thousand
            # brackets take seconds.
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"*{event.anchor} refers to another value; write it out")
            if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
                raise ValueError(f"{event.tag!r} tags a value; a recipe's are plain")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST_RECIPE:
                raise RecursionError
        return yaml.load(text, Loader=_recipe_loader())
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


@functools.cache
def _recipe_loader() -> "type[yaml.SafeLoader]":
    import yaml

    class RecipeLoader(yaml.SafeLoader):
        """Refuses a key that stands there twice; what looks like a date is text."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            _require_unique([key for key in keys if isinstance(key, Hashable)])
            return super().construct_mapping(node, deep=deep)

    RecipeLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NO_RECIPE_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return RecipeLoader


# What plain text could be taken for and no recipe key wants: dates, and `<<`.
_NO_RECIPE_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("timestamp", "merge"))

_OTHER_VARIABLES = ("BILLED_SINCE", "CACHE", "DATA", "LAUNCH", "MODELS", "WAITED_FOR_BY")

# The prefix alone makes names alike: this is one letter in ten.
_SLIP = 0.9


def environment_layer(environment: Mapping[str, str] = os.environ) -> Layer:
    """Recipe values from variables such as `ACCEL_GPT2_LEARNING_RATE`.

    Others with the prefix (ACCEL_GPT2_DATA, ACCEL_GPT2_CACHE, ...) are left alone, unless one looks
    like a recipe key with a slip in it.

    Raises:
        UsageError: naming such a variable and the one that is nearest.

    >>> dict(environment_layer({"ACCEL_GPT2_SEED": "3", "ACCEL_GPT2_DATA": "/data"}).values)
    {'seed': 3}
    """
    known = [ENVIRONMENT_PREFIX + name for name in (*map(str.upper, FIELDS), *_OTHER_VARIABLES)]
    slips = [
        f"{name} is set and has no effect.{hint}"
        for name in sorted(environment)
        if name.startswith(ENVIRONMENT_PREFIX)
        and name not in known
        and (hint := nearest(name, known, cutoff=_SLIP))
    ]
    if slips:
        raise UsageError("\n".join(slips))
    values = {
        key: parse_value(key, environment[ENVIRONMENT_PREFIX + key.upper()])
        for key in FIELDS
        if ENVIRONMENT_PREFIX + key.upper() in environment
    }
    return Layer(origin="the environment (ACCEL_GPT2_...)", values=values)


def assignments_layer(assignments: Sequence[str]) -> Layer:
    """The values of `--set key=value`, each given as a string.

    Raises:
        UsageError: when an assignment has no `=`, or a key is given twice.

    >>> dict(assignments_layer(["trackers=tensorboard,wandb", "max_steps=none"]).values)
    {'trackers': ('tensorboard', 'wandb'), 'max_steps': None}
    """
    values: dict[str, object] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment}: it should be key=value, as in --set seed=1.")
        key = key.strip().replace("-", "_")
        if key in values:
            raise UsageError(f"--set {key} is given twice; give it once.")
        values[key] = parse_value(key, text.strip())
    return Layer(origin="--set", values=values)


def parse_value(key: str, text: str) -> object:
    """A value typed as text, in the type of the recipe's key; what does not parse stays text.

    The strict reader then says what is wrong with it. `none` empties an optional key; a tuple is
    written with commas.
    """
    kind = typing.get_type_hints(TrainRecipe).get(key)
    if kind is None:
        return text
    if text.lower() in {"none", "null"} and type(None) in typing.get_args(kind):
        return None
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    number = int in (kind, *typing.get_args(kind)) or float in (kind, *typing.get_args(kind))
    if not number:
        return text
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def to_yaml(recipe: TrainRecipe) -> str:
    """The recipe as a file that `read_layer` reads back to an equal one.

    >>> "mixed_precision: 'no'" in to_yaml(TrainRecipe())
    True
    """
    import yaml

    values = dataclasses.asdict(recipe)
    plain = {key: list(x) if isinstance(x, tuple) else x for key, x in values.items()}
    # PyYAML writes U+0085 (next line) as it is and reads it back as a space, so that is escaped.
    readable = "\x85" not in json.dumps(plain, ensure_ascii=False)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=readable)


def result_differences(old: TrainRecipe, new: TrainRecipe) -> dict[str, tuple[object, object]]:
    """The keys that change the result and have another value: key -> (old, new)."""
    return {
        key: (getattr(old, key), getattr(new, key))
        for key in FIELDS
        if key not in RUN_FIELDS and getattr(old, key) != getattr(new, key)
    }
