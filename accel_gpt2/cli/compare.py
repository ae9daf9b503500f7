"""`compare`: one command per data set, from documents to a verdict."""

import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accel_gpt2.catalog.arms import ARMS
from accel_gpt2.catalog.models import MODELS, ModelType
from accel_gpt2.cli.options import (
    DatasetOption,
    DebugOption,
    DryRunOption,
    JsonOption,
    ProfileOption,
    QuietOption,
    TrainOptions,
    command_line_layers,
)
from accel_gpt2.cli.output import print_json, print_line, print_table, say
from accel_gpt2.errors import ExitCode, UsageError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.units import format_seconds

if TYPE_CHECKING:
    from accel_gpt2.cli.comparison_runs import PreparedComparison

_DEFAULTS = TrainRecipe()
# "3 generative", "4 lora", ...
_ARMS = ", ".join(
    dict.fromkeys(
        f"{arm.arm} {arm.directory.removeprefix(f'arm-{arm.arm}-')}" for arm in ARMS.values()
    )
)


def _names(model_type: ModelType) -> str:
    return ", ".join(row.name for row in MODELS.values() if row.model_type == model_type)


def compare(
    dataset: DatasetOption = None,
    arms: Annotated[
        str,
        typer.Option(help=f"Numbers with commas between, or all: {_ARMS}."),
    ] = "all",
    model: Annotated[
        str | None,
        typer.Option(
            help="The causal language model of arms 2 to 5 and 8: a catalog name "
            f"({_names('gpt2')}), a local directory or a hub id. [default: {_DEFAULTS.model}]"
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help=f"The encoder of arms 6 and 7: a catalog name ({_names('roberta')}), a local "
            "directory or a hub id. [default: roberta-base, or roberta-tiny beside a model "
            "from random weights]"
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            max=100,
            help="How many times every arm is trained, with seeds 0, 1, ... A seed also decides "
            "which documents are validation; the test documents are always the same.",
        ),
    ] = 1,
    train_documents: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Also train every arm on so many documents per class, for a learning curve.",
        ),
    ] = None,
    ood: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="Another data set, whose documents every arm should notice to be no text of its "
            "own.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Longest document in tokens; the rest is cut, for all arms alike."),
    ] = None,
    profile: ProfileOption = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="[default: runs/compare-<dataset>-<model>]"),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A YAML or JSON file of recipe values for every arm."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="key=value",
            help="Any other recipe value for every arm, for instance epochs=1. Repeatable.",
        ),
    ] = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Set classifiers against each other on one data set.

    Every arm sees the same documents, cut at the same length, and becomes a run directory. What is
    done is not done again: started anew, a comparison goes on where it was. An arm that cannot run
    here is listed with the reason; when a training fails, the others still run, and the exit code
    is that of the failure.
    """
    # Here, because every other verb's help would wait for them.
    from accel_gpt2.cli.comparison_loop import run_comparison
    from accel_gpt2.cli.comparison_runs import prepare_comparison
    from accel_gpt2.plan.comparison import select_arms

    values: dict[str, object] = {
        "dataset": dataset,
        "model": model,
        "max_length": max_length,
        "profile": profile,
    }
    options = TrainOptions(
        layers=command_line_layers(values, set_ or []),
        recipe_file=recipe,
        output_dir=output_dir,
        quiet=quiet,
        debug=debug,
    )
    prepared = prepare_comparison(
        options,
        select_arms(arms),
        encoder=encoder,
        num_seeds=seeds,
        train_documents=_counts(train_documents or ""),
        other_dataset=ood,
        check_weights=not dry_run,
    )
    if dry_run:
        show_plan(prepared, json=json)
        return
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    document, code = run_comparison(prepared, command=command)
    if json:
        print_json(document)
    else:
        show_comparison(document)
    say(f"Report: {prepared.directory / 'report.html'}")
    if code != ExitCode.DONE:
        raise typer.Exit(code)


def _counts(text: str) -> list[int]:
    """
    >>> _counts("64, 256")
    [64, 256]
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    wrong = [word for word in words if not (word.isascii() and word.isdigit() and int(word) > 0)]
    if wrong:
        raise UsageError(
            f"--train-documents {text!r}: {wrong[0]!r} is no number of documents; give whole "
            "numbers with commas between, as in 64,256,1024."
        )
    return [int(word) for word in words]


def show_plan(prepared: "PreparedComparison", *, json: bool) -> None:
    """Data: every run with its directory, and what would be done there."""
    rows = [
        (", ".join(arm.id for arm in run.planned.arms) or "base", str(run.directory), run.outlook)
        for run in prepared.runs
    ]
    if json:
        keys = ("entries", "directory", "outlook")
        print_json({"runs": [dict(zip(keys, row, strict=True)) for row in rows]})
    else:
        print_table(
            {"entries": "left", "run directory": "left", "outlook": "left"},
            [list(row) for row in rows],
        )


def show_comparison(document: Mapping[str, Any]) -> None:
    """Data: a row for each entry, then the verdict."""
    print_table(
        {
            "": "left",
            "accuracy": "right",
            "95% CI": "right",
            "macro-F1": "right",
            "training": "right",
        },
        [_row(entry) for entry in document["entries"]],
    )
    print_line("")
    for sentence in document["verdict"]:
        print_line(textwrap.fill(sentence, width=shutil.get_terminal_size().columns))


def _row(entry: Mapping[str, Any]) -> list[str]:
    name = f"{entry['id']} {entry['name']}"
    metrics = entry["metrics"]
    if metrics is None:
        return [name, "missing"]
    low, high = metrics["accuracy_interval_95"]
    return [
        name,
        f"{metrics['accuracy']:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{metrics['macro_f1']:.3f}",
        format_seconds(metrics["training"]["seconds"]),
    ]
