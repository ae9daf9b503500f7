"""Recipe values as people write them: files, environment variables, `--set key=value`; and back."""

import dataclasses
import functools
import json
import os
import re
import typing
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel_gpt2.errors import UsageError, nearest
from accel_gpt2.recipe import FIELDS, Layer, TrainRecipe
from accel_gpt2.units import format_bytes

if TYPE_CHECKING:
    import yaml

ENVIRONMENT_PREFIX = "ACCEL_GPT2_"

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
