"""From layers of values to one recipe, each value read strictly."""

import dataclasses
import functools
import itertools
import json
import math
import operator
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from annotated_types import Ge, Gt, Le, Lt

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.errors import UsageError, nearest
from accel_gpt2.recipe import FIELDS, Layer, ResolvedRecipe, TrainRecipe
from accel_gpt2.recipe.rules import contradictions

if TYPE_CHECKING:
    from pydantic import TypeAdapter

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
    problems = contradictions(recipe)
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
