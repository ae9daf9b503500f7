"""`plan`: does it fit, how long does it take, and which recipe is best, before anything runs."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accel_gpt2.cli.hardware import DetectedHardware, detect_hardware, planned_profile
from accel_gpt2.cli.options import JsonOption, TrainOptions, given_layers, typed_words
from accel_gpt2.cli.output import print_json, say
from accel_gpt2.cli.run_directory import default_run_directory
from accel_gpt2.durable import write_bytes
from accel_gpt2.errors import DoesNotFitError, UsageError
from accel_gpt2.plan.candidates import CHOICES, Preference
from accel_gpt2.recipe.resolving import resolve

if TYPE_CHECKING:
    from accel_gpt2.plan.run_plan import RunPlan
    from accel_gpt2.plan.search import Depth


def plan(
    options: TrainOptions,
    prefer: Annotated[
        Preference,
        typer.Option(
            help="faithful: the least change to full fine-tuning that fits. quality: fp32 "
            "arithmetic before that. speed: the fastest. memory: the smallest."
        ),
    ] = "faithful",
    show_all: Annotated[
        bool, typer.Option("--all", help="Every candidate that was considered.")
    ] = False,
    explain_: Annotated[
        str | None,
        typer.Option(
            "--explain", metavar="TERM", help="How one term of the memory or the time is computed."
        ),
    ] = None,
    table: Annotated[
        bool,
        typer.Option("--table", help="GPT-2 small to XL on seven machines, with both data sets."),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw the memory of each recipe against the card."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say what fits, how long it takes and which recipe is best.

    What is given is kept, and what is left open is searched, at the same global batch. Nothing is
    loaded and nothing runs. Exit code 3 when nothing fits.
    """
    from accel_gpt2.cli.planning import does_not_fit, measured_here, traced
    from accel_gpt2.plan.memory import covers

    if table:
        others = {"--explain": explain_, "--plot": plot, "--all": show_all}
        unused = [name for name, value in others.items() if value]
        if unused or options.layers:
            names = ", ".join([*unused, *(layer.origin for layer in options.layers)])
            raise UsageError(f"--table prints one table for everything; leave out {names}.")
        from accel_gpt2.cli.plan_table import show_table
        from accel_gpt2.plan.table import requirements_table

        show_table(requirements_table(calibration=measured_here()), json=json)
        return
    made = make_plan(options, prefer=prefer, depth="all" if show_all else "some")
    if not covers(made.asked.recipe, made.model):
        say("No formula covers this: tracing a step, which takes half a minute the first time ...")
        made = traced(made)
    if explain_ is not None:
        from accel_gpt2.cli.plan_output import explain

        explain(made, explain_)
        return
    if plot is not None:
        from accel_gpt2.report.plan_plot import memory_bars

        write_bytes(plot, memory_bars(made))
    command = shlex.join(["accel-gpt2", "train", *_words(options, made)])
    if json:
        from accel_gpt2.cli.plan_document import plan_document

        print_json(plan_document(made, command=command, everything=show_all))
    else:
        from accel_gpt2.cli.plan_output import show_plan

        show_plan(made, command=command, everything=show_all)
    if made.recommended is None:
        raise DoesNotFitError(does_not_fit(made))


def make_plan(
    options: TrainOptions,
    *,
    prefer: Preference = "faithful",
    depth: "Depth" = "some",
    detect: Callable[[], DetectedHardware] = detect_hardware,
) -> "RunPlan":
    """What `train` would do with these options, on a machine that need not be this one.

    Raises:
        UsageError: for a wrong recipe, an unknown profile, or a model of unknown shape.
    """
    from accel_gpt2.cli.planning import asked_strategy, kept_choices, plan_here

    given = given_layers(options)
    asked = resolve(given).recipe
    profile = planned_profile(asked.profile, detect)
    directory = options.output_dir or default_run_directory(asked)
    kept = kept_choices(directory, profile, resume=options.resume)
    strategy = asked_strategy(options.strategy, profile, profile_name=asked.profile)
    made = plan_here([*kept, *given], profile, prefer=prefer, depth=depth, strategy=strategy)
    if made is None:
        raise UsageError(
            f"The shape of {asked.model!r} is not known here: give a catalog name, or a folder "
            "with a config.json."
        )
    return made


def _words(options: TrainOptions, made: "RunPlan") -> list[str]:
    """What to type after `train`: what was given, and what a preference chose in its place."""
    from accel_gpt2.plan.changes import typed_option

    words = typed_words(options)
    if made.prefer == "faithful" or made.recommended is None:
        return words
    recipe, origins = made.recommended.recipe, made.asked.origins
    free = {key: getattr(recipe, key) for key in CHOICES if origins[key] == "default"}
    if origins["placement"] == "default" and made.data is not None and made.data.num_classes > 1:
        free["placement"] = made.recommended.placement
    chosen = " ".join(typed_option(key, x) for key, x in free.items() if x is not None)
    return [*words, *chosen.split()]
