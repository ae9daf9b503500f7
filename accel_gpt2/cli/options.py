"""The options of `train` and of `launch/train.py`, defined once, and those that every verb has."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from accel_gpt2.catalog.datasets import DATASETS
from accel_gpt2.catalog.models import MODELS
from accel_gpt2.catalog.strategies import StrategyName
from accel_gpt2.cli.errors import show_tracebacks
from accel_gpt2.cli.run_directory import RECIPE_FILE
from accel_gpt2.errors import UsageError
from accel_gpt2.recipe import (
    Finetuning,
    Init,
    Layer,
    MixedPrecision,
    Optimizer,
    PlacementChoice,
    TrainRecipe,
)
from accel_gpt2.recipe.layers import assignments_layer, environment_layer, read_layer
from accel_gpt2.units import parse_seconds

_DEFAULTS = TrainRecipe()

StrategyChoice = Literal["auto", StrategyName]

DebugOption = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of a failure.", callback=show_tracebacks),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars; only what matters.")]
DatasetOption = Annotated[
    str | None,
    typer.Option(
        help=f"A catalog name ({', '.join(DATASETS)}), a file, a directory or a hub id. "
        f"[default: {_DEFAULTS.dataset}]"
    ),
]
ProfileOption = Annotated[
    str | None,
    typer.Option(help="The machine; `accel-gpt2 profiles` lists them. [default: auto]"),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be run, and stop.")]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run directory, for instance runs/demo.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What was typed after `train` or `launch/train.py`.

    `layers` hold the options that are recipe values, one layer each, so that a complaint can name
    the option. `strategy` is a catalog name; it is no recipe value, because it belongs to a launch.
    """

    layers: tuple[Layer, ...] = ()
    recipe_file: Path | None = None
    strategy: StrategyChoice = "auto"
    output_dir: Path | None = None
    resume: str = "auto"
    dry_run: bool = False
    quiet: bool = False
    debug: bool = False


def train_command(act: Callable[[TrainOptions], None]) -> Callable[..., None]:
    """A Typer command with the shared options, which hands what was typed to `act`."""

    def train(
        model: Annotated[
            str | None,
            typer.Option(
                help=f"A catalog name ({', '.join(MODELS)}), a local directory or a hub id. "
                f"[default: {_DEFAULTS.model}]"
            ),
        ] = None,
        init: Annotated[
            Init | None,
            typer.Option(help="Start from published or from random weights."),
        ] = None,
        finetuning: Annotated[
            Finetuning | None,
            typer.Option(help="Train all weights, a LoRA adapter, or one on a base in 4 bits."),
        ] = None,
        dataset: DatasetOption = None,
        max_length: Annotated[
            int | None,
            typer.Option(help="Longest document in tokens; the rest is cut."),
        ] = None,
        epochs: Annotated[
            float | None,
            typer.Option(help="Passes over each class's documents."),
        ] = None,
        max_steps: Annotated[
            int | None,
            typer.Option(help="Optimizer steps of each class, at most."),
        ] = None,
        learning_rate: Annotated[
            float | None,
            typer.Option(help="The highest rate of the schedule."),
        ] = None,
        global_batch_tokens: Annotated[
            int | None,
            typer.Option(help="Document tokens of one optimizer step, on all machines together."),
        ] = None,
        optimizer: Annotated[Optimizer | None, typer.Option(help="The optimizer.")] = None,
        mixed_precision: Annotated[
            MixedPrecision | None,
            typer.Option(help="What the GPU computes in. [default: by plan]"),
        ] = None,
        gradient_checkpointing: Annotated[
            bool | None,
            typer.Option(
                "--gradient-checkpointing/--no-gradient-checkpointing",
                help="Less memory for a third more time. [default: by plan]",
            ),
        ] = None,
        strategy: Annotated[
            StrategyChoice,
            typer.Option(help="How one model is spread over the GPUs; auto: by plan."),
        ] = "auto",
        placement: Annotated[
            PlacementChoice | None,
            typer.Option(help="How the classes' models share the machine. [default: by plan]"),
        ] = None,
        seed: Annotated[int | None, typer.Option(help="Of every random choice.")] = None,
        profile: ProfileOption = None,
        output_dir: Annotated[
            Path | None,
            typer.Option(help="The run directory. [default: runs/<dataset>-<model>]"),
        ] = None,
        max_time: Annotated[
            str | None,
            typer.Option(metavar="<duration>", help="Stop, saved, after so long: 90s, 15m, 1h30m."),
        ] = None,
        budget_usd: Annotated[
            float | None,
            typer.Option(help="Stop, saved, after so much money, at --set price_usd_per_hour=..."),
        ] = None,
        resume: Annotated[
            str,
            typer.Option(
                metavar="auto|never|PATH",
                help="Go on from the run's newest whole checkpoint, start anew, or go on from "
                "this checkpoint.",
            ),
        ] = "auto",
        recipe: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="A YAML or JSON file of recipe values."),
        ] = None,
        set_: Annotated[
            list[str] | None,
            typer.Option(
                "--set",
                metavar="key=value",
                help="Any other recipe value, for instance dropout=0. Repeatable.",
            ),
        ] = None,
        dry_run: DryRunOption = False,
        quiet: QuietOption = False,
        debug: DebugOption = False,
    ) -> None:
        values: dict[str, object] = {
            "model": model,
            "init": init,
            "finetuning": finetuning,
            "dataset": dataset,
            "max_length": max_length,
            "epochs": epochs,
            "max_steps": max_steps,
            "learning_rate": learning_rate,
            "global_batch_tokens": global_batch_tokens,
            "optimizer": optimizer,
            "mixed_precision": mixed_precision,
            "gradient_checkpointing": gradient_checkpointing,
            "placement": placement,
            "seed": seed,
            "profile": profile,
            "max_time_seconds": None if max_time is None else parse_seconds(max_time),
            "budget_usd": budget_usd,
        }
        act(
            TrainOptions(
                layers=command_line_layers(values, set_ or []),
                recipe_file=recipe,
                strategy=strategy,
                output_dir=output_dir,
                resume=resume,
                dry_run=dry_run,
                quiet=quiet,
                debug=debug,
            )
        )

    train.__doc__ = act.__doc__
    return train


def with_train_options(
    act: Callable[..., None], *, without: Collection[str] = ()
) -> Callable[..., None]:
    """A Typer command with the options of `train`, `without` some, and after them those of `act`.

    `act` takes what `train` would be given as its first argument, and its own options by keyword.
    """
    own = list(inspect.signature(act).parameters.values())[1:]
    shared = inspect.signature(train_command(act)).parameters.values()

    def command(**typed: object) -> None:
        mine = {parameter.name: typed.pop(parameter.name) for parameter in own}
        train_command(lambda options: act(options, **mine))(**typed)

    parameters = [x for x in shared if x.name not in without]
    command.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
    command.__name__, command.__doc__ = act.__name__, act.__doc__
    return command


_OPTION_NAMES = {"max_time_seconds": "--max-time"}


def command_line_layers(values: dict[str, object], assignments: list[str]) -> tuple[Layer, ...]:
    """One layer for each option that was given (is not None), and one for all `--set`.

    Raises:
        UsageError: when two of them speak about the same thing.

    >>> [layer.origin for layer in command_line_layers({"seed": 1, "model": None}, ["dropout=0"])]
    ['--seed', '--set']
    """
    assigned = assignments_layer(assignments)
    options = [
        Layer(origin=_OPTION_NAMES.get(key, f"--{key.replace('_', '-')}"), values={key: value})
        for key, value in values.items()
        if value is not None
    ]
    problems = []
    for layer in options:
        (key,) = layer.values
        if key in assigned.values:
            problems.append(f"{layer.origin} and --set {key}=... are both given; give one of them.")
        if key == "global_batch_tokens" and assigned.values.get("global_batch_size"):
            problems.append(
                f"{layer.origin} and --set global_batch_size=... are both given; a batch is "
                "counted in tokens or in documents: give one of them."
            )
    if problems:
        raise UsageError("\n".join(problems))
    return (*options, assigned) if assigned.values else tuple(options)


def given_layers(options: TrainOptions) -> list[Layer]:
    """What the person gave: a file, the environment, options; each goes over the ones before.

    Raises:
        UsageError: for a file or an environment that cannot be read.
    """
    given: list[Layer] = []
    if options.recipe_file is not None:
        given.append(read_layer(options.recipe_file))
    # A run's own recipe.yaml is already resolved, and the environment has had its say in it.
    if not is_own_recipe(options.recipe_file, options.output_dir):
        environment = environment_layer()
        given += [environment] if environment.values else []
    return [*given, *options.layers]


def is_own_recipe(recipe_file: Path | None, output_dir: Path | None) -> bool:
    """Whether a recipe file is what a run directory was made with, resolved to the last value."""
    if recipe_file is None or output_dir is None:
        return False
    return recipe_file.absolute() == (output_dir / RECIPE_FILE).absolute()


def typed_words(options: TrainOptions) -> list[str]:
    """What was typed of a recipe, its strategy and directory, as words of a command line.

    >>> typed_words(TrainOptions(layers=command_line_layers(
    ...     {"model": "gpt2", "gradient_checkpointing": False}, ["class_names=no,yes"])))
    ['--model', 'gpt2', '--no-gradient-checkpointing', '--set', 'class_names=no,yes']
    """
    words = [] if options.recipe_file is None else ["--recipe", str(options.recipe_file)]
    for layer in options.layers:
        for key, value in layer.values.items():
            if layer.origin == "--set":
                words += ["--set", f"{key}={_typed_value(value)}"]
            elif isinstance(value, bool):
                words.append(layer.origin if value else layer.origin.replace("--", "--no-", 1))
            else:
                words += [layer.origin, _typed_value(value)]
    words += [] if options.strategy == "auto" else ["--strategy", options.strategy]
    words += [] if options.output_dir is None else ["--output-dir", str(options.output_dir)]
    return words


def _typed_value(value: object) -> str:
    if isinstance(value, bool | None):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)
