"""Recipes: read strictly, laid over one another in order, written back exactly."""

import dataclasses
import json
import math
import re
import typing
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict, TypeAdapter, ValidationError

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.errors import UsageError
from accel_gpt2.recipe import FIELDS, RUN_FIELDS, Layer, TrainRecipe, result_differences
from accel_gpt2.recipe.layers import (
    assignments_layer,
    environment_layer,
    parse_value,
    read_layer,
    to_yaml,
)
from accel_gpt2.recipe.resolving import resolve


def recipe_of(**values: object) -> TrainRecipe:
    """The recipe of one layer of values."""
    return resolve([Layer(origin="a file", values=values)]).recipe


def test_no_layers_give_the_defaults() -> None:
    """The defaults are the person's own experiment: gpt2 on imdb."""
    resolved = resolve([])
    assert resolved.recipe == TrainRecipe()
    assert (resolved.recipe.model, resolved.recipe.dataset) == ("gpt2", "imdb")
    assert set(resolved.origins.values()) == {"default"}


def test_later_layers_win_and_every_value_knows_its_origin() -> None:
    """The last layer that names a key decides it, and is named as its origin."""
    resolved = resolve(
        [
            Layer(origin="a.yaml", values={"seed": 1, "epochs": 2.0}),
            Layer(origin="--seed", values={"seed": 2}),
        ]
    )
    assert (resolved.recipe.seed, resolved.recipe.epochs) == (2, 2.0)
    assert resolved.origins["seed"] == "--seed"
    assert resolved.origins["epochs"] == "a.yaml"


def test_a_model_row_stands_between_defaults_and_layers() -> None:
    """gpt2-tiny brings its own learning rate, and a file overrides it."""
    tiny = recipe_of(model="gpt2-tiny")
    assert tiny.learning_rate == MODELS["gpt2-tiny"].recipe_defaults["learning_rate"]
    assert recipe_of(model="gpt2-tiny", learning_rate=1e-4).learning_rate == 1e-4


def test_the_last_named_model_brings_its_row() -> None:
    """A model in a file that an option replaces leaves none of its values behind."""
    resolved = resolve(
        [
            Layer(origin="a.yaml", values={"model": "gpt2-tiny"}),
            Layer(origin="--model", values={"model": "gpt2-medium"}),
        ]
    )
    assert resolved.recipe.init == "pretrained"
    assert resolved.recipe == dataclasses.replace(TrainRecipe(), model="gpt2-medium")


@pytest.mark.parametrize("key", FIELDS)
def test_a_value_is_taken_where_strict_reading_takes_it(key: str) -> None:
    """What a recipe sees by itself to be right is what pydantic takes: at each limit and beside it,
    and of each type that is another one.
    """
    kind = typing.get_type_hints(TrainRecipe, include_extras=True)[key]
    reader: TypeAdapter[object] = TypeAdapter(
        kind, config=ConfigDict(strict=True, allow_inf_nan=False)
    )
    limits = {0.0, *map(float, re.findall(r"\b[gl][te]=([\d.]+)", repr(kind)))}
    numbers = [limit + step for limit in limits for step in (-1, -1e-9, 0, 1e-9, 1)]
    numbers += [int(number) for number in numbers]
    words = ["", "a", "auto", "no", "on", "pretrained", "nf4", "sequential"]
    for value in [*numbers, *words, math.inf, -math.inf, math.nan, None]:
        for given_value in (value, [value], True):
            problem, found = "", None
            try:
                found = getattr(recipe_of(**{key: given_value}), key)
            except UsageError as error:
                problem = str(error)
            try:
                wanted = reader.validate_json(json.dumps(given_value))
            except ValidationError:
                assert problem.startswith(f"{key} = ")
                assert "should be" in problem
            else:
                # Right by itself, it may still contradict another key.
                assert "should be" not in problem
                assert problem or (type(found), found) == (type(wanted), wanted)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"seed": "3"}, r"seed = '3' \(from a file\): it should be a valid integer\."),
        ({"seed": 3.0}, r"seed = 3\.0 .*valid integer"),
        ({"seed": True}, r"seed = True .*valid integer"),
        ({"gradient_checkpointing": 1}, r"gradient_checkpointing = 1 .*valid boolean"),
        ({"fused_gelu": "yes"}, r"fused_gelu = 'yes' .*valid boolean"),
        ({"model": 2}, r"model = 2 .*valid string"),
        ({"epochs": 0}, r"epochs = 0 .*greater than 0"),
        ({"dropout": 1.0}, r"dropout = 1\.0 .*less than 1"),
        ({"learning_rate": math.nan}, r"learning_rate = .*finite number"),
        ({"learning_rate": math.inf}, r"learning_rate = .*finite number"),
        ({"validation_fraction": 0.6}, r"validation_fraction = 0\.6 .*less than or equal to 0\.5"),
        (
            {"mixed_precision": "bf8"},
            r"mixed_precision = 'bf8' .*'no', 'fp16', 'bf16' or 'pure_bf16'",
        ),
        ({"optimizer": None}, r"optimizer = None .*'adamw', .*'adamw_8bit_paged' or 'adafactor'"),
        ({"class_names": "a"}, r"class_names = 'a' .*"),
        ({"max_steps": 0}, r"max_steps = 0 .*greater than or equal to 1"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(values: dict[str, object], match: str) -> None:
    """Nothing is converted or clipped: the key, the value and its origin are named."""
    with pytest.raises(UsageError, match=match):
        recipe_of(**values)


def test_an_unknown_key_names_the_nearest_one() -> None:
    """A misspelt key is an error with a suggestion, never ignored."""
    with pytest.raises(
        UsageError, match=r"'learning_rte' is not .* Did you mean 'learning_rate'\?"
    ):
        recipe_of(learning_rte=1e-3)


def test_all_problems_are_reported_at_once() -> None:
    """Unknown keys, wrong values and contradicting keys of several layers come in one error."""
    with pytest.raises(UsageError) as caught:
        resolve(
            [
                Layer(origin="a.yaml", values={"sede": 1, "epochs": -1.0}),
                Layer(origin="--set", values={"global_batch_tokens": 8, "global_batch_size": 8}),
                Layer(origin="--dropout", values={"dropout": 2.0}),
            ]
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "a.yaml: 'sede' is not a recipe key. Did you mean 'seed'?" in lines
    assert any("--set: global_batch_tokens and global_batch_size" in line for line in lines)
    assert any("epochs = -1.0 (from a.yaml)" in line for line in lines)
    assert any("dropout = 2.0 (from --dropout)" in line for line in lines)


def test_a_batch_in_documents_replaces_the_default_in_tokens() -> None:
    """Giving one batch key empties the other one, in the order of the layers."""
    assert recipe_of(global_batch_size=16).global_batch_tokens is None
    resolved = resolve(
        [
            Layer(origin="a.yaml", values={"global_batch_size": 16}),
            Layer(origin="--global-batch-tokens", values={"global_batch_tokens": 4096}),
        ]
    )
    assert resolved.recipe.global_batch_size is None
    assert resolved.recipe.global_batch_tokens == 4096


def test_both_batch_keys_in_one_layer_are_an_error() -> None:
    """A layer that counts the batch twice is contradictory."""
    with pytest.raises(UsageError, match="both given; give one of them"):
        recipe_of(global_batch_size=16, global_batch_tokens=4096)


def test_no_batch_key_is_an_error() -> None:
    """A recipe without any global batch is not a recipe."""
    with pytest.raises(UsageError, match="both empty; give one"):
        recipe_of(global_batch_tokens=None)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"max_length": 2048}, r"gpt2 has 1024 positions; give --max-length 1024 or less"),
        ({"model": "gpt2-tiny", "init": "pretrained"}, "gpt2-tiny has no pretrained weights"),
        ({"tokenizer": "train"}, "pretrained weights know only their own tokens"),
        ({"finetuning": "lora", "init": "scratch"}, "an adapter on random weights"),
        (
            {"bf16_rounding": "kahan", "mixed_precision": "bf16"},
            "'kahan' with mixed_precision = 'bf16': only bf16 weights are rounded",
        ),
        ({"finetuning": "qlora", "init": "scratch"}, "'qlora' .* an adapter on random weights"),
        (
            {"use_dora": True},
            r"use_dora = True with finetuning = 'full': .* give --finetuning lora or qlora",
        ),
        (
            {"use_dora": True, "finetuning": "lora", "lora_dropout": 0.1},
            r"lora_dropout = 0\.1 on a GPT-2: .* give --set lora_dropout=0",
        ),
        (
            {"quantization": "int8", "finetuning": "lora"},
            r"quantization = 'int8' with finetuning = 'lora': .* give --finetuning qlora",
        ),
        (
            {"checkpointed_layers": 3},
            r"checkpointed_layers = 3 without gradient_checkpointing: give --gradient-checkpo",
        ),
        (
            {"checkpointed_layers": 13, "gradient_checkpointing": True},
            r"checkpointed_layers = 13: gpt2 has 12 blocks; give --set checkpointed_layers=12",
        ),
        (
            {"release_gradients": True, "global_batch_tokens": 4096},
            r"release_gradients with max_grad_norm = 1: .* give --set max_grad_norm=0",
        ),
        (
            {"release_gradients": True, "max_grad_norm": 0.0},
            r"micro batches of 4,096 tokens of a global batch of 8,192: .*micro_batch_tokens=8192",
        ),
        (
            {"release_gradients": True, "max_grad_norm": 0.0, "global_batch_size": 5},
            r"micro batches of 4,096 tokens of a global batch of 5,115: ",
        ),
        (
            {"release_gradients": True, "global_batch_tokens": 4096, "mixed_precision": "fp16"},
            r"release_gradients with mixed_precision = 'fp16': .* give --mixed-precision bf16",
        ),
        (
            {"budget_usd": 5.0},
            r"budget_usd = 5 with no price_usd_per_hour: .* give --set price_usd_per_hour=",
        ),
        (
            {"budget_usd": 5.0, "price_usd_per_hour": 0.0},
            r"budget_usd = 5 with a price of 0: .* give --set price_usd_per_hour=",
        ),
    ],
)
def test_contradictions_say_what_to_type(values: dict[str, object], match: str) -> None:
    """Values that do not go together are named with a way out."""
    with pytest.raises(UsageError, match=match):
        recipe_of(**values)


def test_a_budget_is_of_the_run_and_goes_with_a_price() -> None:
    """A budget with a price is a recipe, and a run may go on with a larger one."""
    recipe = recipe_of(budget_usd=5.0, price_usd_per_hour=1.5)
    assert (recipe.budget_usd, recipe.price_usd_per_hour) == (5.0, 1.5)
    assert "budget_usd" in RUN_FIELDS


def test_an_unquoted_no_is_a_precision(tmp_path: Path) -> None:
    """`mixed_precision: no` is a YAML boolean and is read as what the person meant."""
    path = tmp_path / "recipe.yaml"
    path.write_text("mixed_precision: no\nseed: 7\n", encoding="utf-8")
    recipe = resolve([read_layer(path)]).recipe
    assert (recipe.mixed_precision, recipe.seed) == ("no", 7)


def test_an_unquoted_on_is_a_switch(tmp_path: Path) -> None:
    """`packing: on` and `compile: off` are YAML booleans and are read as what the person meant."""
    path = tmp_path / "recipe.yaml"
    path.write_text("packing: on\ncompile: off\n", encoding="utf-8")
    recipe = resolve([read_layer(path)]).recipe
    assert (recipe.packing, recipe.compile) == ("on", "off")
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert resolve([read_layer(path)]).recipe == recipe


def test_only_a_language_model_is_packed() -> None:
    """A head reads each document's last token, and masks are drawn for padded rows."""
    match = r"packing = 'on' with objective = 'classification': .* give --set packing=off"
    with pytest.raises(UsageError, match=match):
        recipe_of(packing="on", objective="classification")


def test_json_files_are_read(tmp_path: Path) -> None:
    """A .json recipe is read as JSON, lists becoming tuples."""
    path = tmp_path / "recipe.json"
    path.write_text('{"class_names": ["ham", "spam"], "epochs": 2}', encoding="utf-8")
    recipe = resolve([read_layer(path)]).recipe
    assert recipe.class_names == ("ham", "spam")
    assert recipe.epochs == 2.0


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.yaml", b"seed: [1", r"a\.yaml is not YAML .*line 1"),
        ("a.json", b"{seed: 1}", r"a\.json is not JSON"),
        ("a.yaml", b"- seed", r"holds a list; it should hold lines of `key: value`"),
        ("a.yaml", b"seed", r"holds a str; it should hold"),
        ("a.yaml", b"\xff\xfe\x00", r"a\.yaml is not UTF-8 text"),
    ],
)
def test_an_unreadable_file_is_a_sentence(
    tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    """Whatever is wrong with a recipe file, the error names the file and the reason."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=match):
        read_layer(tmp_path / name)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    """The path that does not exist is named."""
    with pytest.raises(UsageError, match=r"none\.yaml does not exist"):
        read_layer(tmp_path / "none.yaml")


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    """A directory in place of a file is named, not a traceback."""
    with pytest.raises(UsageError, match=r"is not a file"):
        read_layer(tmp_path)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    """A file with only comments is an empty layer."""
    path = tmp_path / "recipe.yaml"
    path.write_text("# nothing yet\n", encoding="utf-8")
    assert resolve([read_layer(path)]).recipe == TrainRecipe()


def test_environment_variables_are_recipe_values() -> None:
    """ACCEL_GPT2_<KEY> sets a key in its own type; other variables are left alone."""
    layer = environment_layer(
        {
            "ACCEL_GPT2_LEARNING_RATE": "1e-4",
            "ACCEL_GPT2_GRADIENT_CHECKPOINTING": "true",
            "ACCEL_GPT2_MAX_STEPS": "none",
            "ACCEL_GPT2_DATA": "/data",
            "LEARNING_RATE": "5",
        }
    )
    assert dict(layer.values) == {
        "learning_rate": 1e-4,
        "gradient_checkpointing": True,
        "max_steps": None,
    }


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "3", 3),
        ("seed", "3.5", 3.5),
        ("seed", "x", "x"),
        ("learning_rate", "1e-4", 1e-4),
        ("max_steps", "None", None),
        ("max_steps", "12", 12),
        ("model", "none", "none"),
        ("model", "3", "3"),
        ("fused_gelu", "False", False),
        ("fused_gelu", "no", "no"),
        ("mixed_precision", "no", "no"),
        ("trackers", "", ()),
        ("trackers", "tensorboard, wandb", ("tensorboard", "wandb")),
        ("no_such_key", "1", "1"),
    ],
)
def test_text_becomes_a_value_of_the_keys_type(key: str, text: str, value: object) -> None:
    """What does not parse stays text, and the strict reader complains about it."""
    parsed = parse_value(key, text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_an_assignment_without_equals_is_an_error() -> None:
    """`--set seed` says what it should look like."""
    with pytest.raises(UsageError, match="should be key=value, as in --set seed=1"):
        assignments_layer(["seed"])


def test_assignments_take_dashes_and_keep_further_equals() -> None:
    """`--set learning-rate=1` means the key; only the first `=` separates."""
    assert dict(assignments_layer(["learning-rate = 1", "model=a=b"]).values) == {
        "learning_rate": 1,
        "model": "a=b",
    }


def test_an_assignment_given_twice_is_an_error() -> None:
    """A value that would have no effect is named, not dropped."""
    with pytest.raises(UsageError, match="--set seed is given twice"):
        assignments_layer(["seed=1", "seed=2"])


def test_only_what_changes_the_result_is_a_difference() -> None:
    """Moving a run to another machine is no difference; another learning rate is one."""
    moved = dataclasses.replace(
        TrainRecipe(), profile="t4", micro_batch_tokens=1024, gradient_checkpointing=True
    )
    assert result_differences(TrainRecipe(), moved) == {}
    other = dataclasses.replace(moved, learning_rate=1.0)
    assert result_differences(TrainRecipe(), other) == {"learning_rate": (5e-5, 1.0)}


def test_every_key_is_either_of_the_result_or_of_the_run() -> None:
    """The keys from `profile` on change how a run goes; those before it change the result."""
    assert len(FIELDS) == len(set(FIELDS))
    assert {"profile", "micro_batch_tokens", "max_time_seconds"} <= RUN_FIELDS
    assert not {"mixed_precision", "global_batch_tokens", "seed", "epochs"} & RUN_FIELDS


words = st.text(min_size=1, max_size=20).filter(lambda text: "\x00" not in text)
recipes = st.builds(
    dict,
    model=st.sampled_from(["gpt2", "gpt2-xl", "some/model"]),
    dataset=words.filter(str.strip),
    class_names=st.lists(words, max_size=3).map(tuple),
    init=st.sampled_from(["pretrained", "scratch"]),
    epochs=st.floats(min_value=1e-300, max_value=1e5),
    learning_rate=st.floats(min_value=1e-300, max_value=1e3),
    dropout=st.floats(min_value=0, max_value=1, exclude_max=True),
    max_steps=st.none() | st.integers(1, 2**31 - 1),
    global_batch_size=st.none() | st.integers(1, 2**31 - 1),
    mixed_precision=st.sampled_from(["no", "fp16", "bf16", "pure_bf16"]),
    seed=st.integers(0, 2**31 - 1),
    gradient_checkpointing=st.booleans(),
    price_usd_per_hour=st.none() | st.floats(0, 1e6),
    trackers=st.lists(words, max_size=3).map(tuple),
)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all examples, written over each time."""
    return tmp_path_factory.mktemp("recipe") / "recipe.yaml"


@settings(max_examples=100, deadline=None)
@given(values=recipes)
@example(values={"class_names": ("a\x85b", "Größe", "\u2028", "no", "1e3")})
def test_a_written_recipe_is_read_back_equal(recipe_file: Path, values: dict[str, object]) -> None:
    """Whatever a recipe holds, YAML on disk gives the same recipe again."""
    recipe = recipe_of(**values)
    recipe_file.write_text(to_yaml(recipe), encoding="utf-8")
    assert resolve([read_layer(recipe_file)]).recipe == recipe


@pytest.mark.parametrize(
    ("values", "learning_rate", "origin"),
    [
        ({}, 5e-5, "default"),
        ({"finetuning": "lora"}, 2e-4, "finetuning lora"),
        ({"finetuning": "qlora"}, 2e-4, "finetuning qlora"),
        ({"init": "scratch"}, 6e-4, "init scratch"),
        ({"model": "gpt2-tiny"}, 2e-3, "model gpt2-tiny"),
        ({"model": "roberta-tiny", "objective": "masked_lm"}, 5e-4, "model roberta-tiny"),
        ({"finetuning": "lora", "learning_rate": 1e-3}, 1e-3, "test"),
    ],
)
def test_the_learning_rate_follows_what_is_trained(
    values: dict[str, object], learning_rate: float, origin: str
) -> None:
    """Published weights, adapters and random weights want different ones; what is given holds."""
    resolved = resolve([Layer(origin="test", values=values)])
    assert (resolved.recipe.learning_rate, resolved.origins["learning_rate"]) == (
        learning_rate,
        origin,
    )


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"model": "roberta-base"}, "sees a token's right side too"),
        ({"model": "roberta-tiny", "objective": "hybrid"}, "sees a token's right side too"),
        ({"model": "gpt2", "objective": "masked_lm"}, "has no mask token"),
        ({"objective": "hybrid", "finetuning": "lora"}, "trained whole, side by side"),
        ({"objective": "hybrid", "finetuning": "qlora"}, "trained whole, side by side"),
        ({"objective": "classify"}, "objective = 'classify'"),
        ({"objective": "masked_lm", "mask_fraction": 1.0}, "mask_fraction = 1.0"),
    ],
)
def test_an_objective_that_a_model_cannot_have_is_refused(
    values: dict[str, object], match: str
) -> None:
    """Before anything is loaded, with what to give instead."""
    with pytest.raises(UsageError, match=match):
        resolve([Layer(origin="test", values=values)])
