"""The shared options: each becomes a recipe value whose origin is the option."""

import typing

import pytest
import typer
from typer.testing import CliRunner

from accel_gpt2.cli.errors import plain_app
from accel_gpt2.cli.options import (
    TrainOptions,
    command_line_layers,
    train_command,
    typed_words,
)
from accel_gpt2.errors import UsageError
from accel_gpt2.recipe import Finetuning, Init, MixedPrecision, Optimizer
from accel_gpt2.recipe.resolving import resolve


def typed(*arguments: str) -> TrainOptions:
    """What the shared command hands on for these arguments."""
    seen: list[TrainOptions] = []
    app = plain_app()
    app.command()(train_command(seen.append))
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    (options,) = seen
    return options


def test_nothing_typed_is_nothing_decided() -> None:
    """Options that were not given leave every recipe value to the layers below."""
    assert typed() == TrainOptions()


def test_a_strategy_is_typed_and_typed_again() -> None:
    """It belongs to a launch and is no recipe value; `plan` hands it on to `train`."""
    given = typed("--strategy", "zero3", "--model", "gpt2-xl")
    assert (given.strategy, len(given.layers)) == ("zero3", 1)
    assert typed_words(given) == ["--model", "gpt2-xl", "--strategy", "zero3"]
    assert typed_words(typed()) == []


@pytest.mark.parametrize(
    ("arguments", "key", "value", "origin"),
    [
        (["--model", "gpt2-xl"], "model", "gpt2-xl", "--model"),
        (["--init", "scratch"], "init", "scratch", "--init"),
        (["--dataset", "ag_news"], "dataset", "ag_news", "--dataset"),
        (["--profile", "t4"], "profile", "t4", "--profile"),
        (["--placement", "per-gpu"], "placement", "per-gpu", "--placement"),
        (["--epochs", "0.5"], "epochs", 0.5, "--epochs"),
        (["--max-steps", "7"], "max_steps", 7, "--max-steps"),
        (["--max-time", "1h30m"], "max_time_seconds", 5400.0, "--max-time"),
        (
            ["--budget-usd", "2.5", "--set", "price_usd_per_hour=0.7"],
            "budget_usd",
            2.5,
            "--budget-usd",
        ),
        (["--learning-rate", "1e-4"], "learning_rate", 1e-4, "--learning-rate"),
        (["--global-batch-tokens", "99"], "global_batch_tokens", 99, "--global-batch-tokens"),
        (["--max-length", "64"], "max_length", 64, "--max-length"),
        (["--mixed-precision", "bf16"], "mixed_precision", "bf16", "--mixed-precision"),
        (["--finetuning", "lora"], "finetuning", "lora", "--finetuning"),
        (["--optimizer", "adafactor"], "optimizer", "adafactor", "--optimizer"),
        (["--gradient-checkpointing"], "gradient_checkpointing", True, "--gradient-checkpointing"),
        (
            ["--no-gradient-checkpointing"],
            "gradient_checkpointing",
            False,
            "--gradient-checkpointing",
        ),
        (["--seed", "3"], "seed", 3, "--seed"),
        (["--set", "dropout=0.2"], "dropout", 0.2, "--set"),
    ],
)
def test_an_option_is_a_recipe_value(
    arguments: list[str], key: str, value: object, origin: str
) -> None:
    """The value arrives in the recipe, and its origin is the option as it was typed."""
    resolved = resolve(typed(*arguments).layers)
    assert getattr(resolved.recipe, key) == value
    assert resolved.origins[key] == origin


def test_set_can_be_repeated() -> None:
    """Several --set make one layer."""
    recipe = resolve(typed("--set", "seed=4", "--set", "dropout=0").layers).recipe
    assert (recipe.seed, recipe.dropout) == (4, 0.0)


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("--init", Init),
        ("--mixed-precision", MixedPrecision),
        ("--finetuning", Finetuning),
        ("--optimizer", Optimizer),
    ],
)
def test_choices_are_those_of_the_recipe(option: str, choices: object) -> None:
    """Every choice is accepted, and anything else is a usage error that lists them."""
    for choice in typing.get_args(choices):
        assert typed(option, choice).layers
    app = plain_app()
    app.command()(train_command(lambda options: None))
    result = CliRunner().invoke(app, [option, "other"])
    assert result.exit_code == 2
    assert all(f"'{choice}'" in result.output for choice in typing.get_args(choices))


@pytest.mark.parametrize(
    ("values", "assignments", "match"),
    [
        ({"seed": 1}, ["seed=2"], r"--seed and --set seed=\.\.\. are both given"),
        (
            {"max_time_seconds": 1.0},
            ["max_time_seconds=2"],
            "--max-time and --set max_time_seconds",
        ),
        ({"global_batch_tokens": 8}, ["global_batch_size=2"], "counted in tokens or in documents"),
    ],
)
def test_an_option_without_effect_is_an_error(
    values: dict[str, object], assignments: list[str], match: str
) -> None:
    """Of two options about one thing neither is dropped in silence."""
    with pytest.raises(UsageError, match=match):
        command_line_layers(values, assignments)


def test_a_wrong_duration_is_a_usage_error() -> None:
    """--max-time says what a duration looks like."""
    with pytest.raises(UsageError, match="'soon' is not a duration"):
        typed("--max-time", "soon")


def test_the_docstring_is_the_help() -> None:
    """Each of the two commands explains itself, with the same options."""

    def act(options: TrainOptions) -> None:
        """Does this and that."""

    app = typer.Typer(rich_markup_mode=None)
    app.command()(train_command(act))
    assert "Does this and that." in CliRunner().invoke(app, ["--help"]).output
