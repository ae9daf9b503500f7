"""`cloud`: run a training on a rented machine, within a budget, and see what is running there."""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from accel_gpt2.cli import cloud_launch
from accel_gpt2.cli.cloud_launch import YesOption, agreed
from accel_gpt2.cli.errors import plain_app
from accel_gpt2.cli.options import DebugOption, JsonOption, with_train_options
from accel_gpt2.cli.output import print_json, print_line, print_table, say, warn
from accel_gpt2.errors import ExitCode, UserError
from accel_gpt2.units import format_bytes

if TYPE_CHECKING:
    from accel_gpt2.cloud.engine import Standing
    from accel_gpt2.cloud.ledger import Launch

app = plain_app(no_args_is_help=True)

_NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="As `accel-gpt2 cloud status` lists it.")
]


@app.callback()
def cloud(debug: DebugOption = False) -> None:
    """Train on a rented GPU, within a budget."""


app.command()(
    with_train_options(
        cloud_launch.launch,
        without={"profile", "max_time", "budget_usd", "resume", "dry_run", "quiet"},
    )
)


@app.command()
def status(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One launch. [default: all]")
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Where the launches are; what should have ended is warned of."""
    from accel_gpt2.cloud.ledger import read_launch, read_launches

    launches = read_launches() if name is None else [read_launch(name)]
    standings = [_standing(launch) for launch in launches]
    if json:
        rows = [
            {**dataclasses.asdict(launch), "standing": standing, "overdue": launch.is_overdue}
            for launch, standing in zip(launches, standings, strict=True)
        ]
        print_json({"launches": rows})
    elif not launches:
        say("Nothing was launched yet.")
    else:
        print_table(
            {"Name": "left", "Machine": "left", "$/h": "right", "Until": "left", "State": "left"},
            [
                [
                    launch.name,
                    f"{launch.provider} {launch.gpu}",
                    f"{launch.usd_per_hour:g}",
                    launch.deadline[:16].replace("T", " ") + " UTC",
                    standing,
                ]
                for launch, standing in zip(launches, standings, strict=True)
            ],
        )
    for launch, standing in zip(launches, standings, strict=True):
        if launch.is_overdue and not launch.is_over(standing):
            warn(f"{launch.name} should have ended: `accel-gpt2 cloud cancel {launch.name}`.")


def _standing(launch: "Launch") -> str:
    if launch.state == "ended":
        return "ended" if launch.exit_code is None else f"ended ({launch.exit_code})"
    from accel_gpt2.cloud.engines import engine_of

    try:
        return engine_of(launch.engine).status(launch)
    except UserError as error:
        say(str(error))
        return "unknown"


@app.command()
def logs(
    name: _NameArgument,
    follow: Annotated[bool, typer.Option("--follow", help="Until the training ends.")] = False,
    debug: DebugOption = False,
) -> None:
    """What a training says."""
    from accel_gpt2.cloud.engines import engine_of
    from accel_gpt2.cloud.ledger import read_launch

    launch = read_launch(name)
    engine_of(launch.engine).logs(launch, follow=follow)


@app.command()
def fetch(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A launch's name, or the run directory: its newest launch."
        ),
    ],
    what: Annotated[
        Literal["results", "all"], typer.Option(help="results: everything but checkpoints.")
    ] = "all",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Bring a run here: models, checkpoints, logs and report.

    From its machine, or from its bucket when the machine is gone. What is here already is not
    copied again, also when a fetch broke off; models and checkpoints are held against their
    manifests.
    """
    from accel_gpt2.cloud.engines import engine_of
    from accel_gpt2.cloud.fetch import fetch_run
    from accel_gpt2.cloud.ledger import exit_code_of, find_launch, note_spent, write_launch

    launch = find_launch(run)
    engine = engine_of(launch.engine)
    fetched = fetch_run(engine, launch, what)
    standing = engine.status(launch)
    exit_code = exit_code_of(launch)
    if launch.state != "ended" and launch.is_over(standing):
        note_spent(launch)
        write_launch(launch.in_state("ended", exit_code))
    if json:
        print_json(
            {
                "name": launch.name,
                "run_directory": launch.run_directory,
                "what": what,
                "standing": standing,
                "exit_code": exit_code,
                **dataclasses.asdict(fetched),
            }
        )
        return
    print_line(
        f"{launch.run_directory}: {fetched.num_files} files, {format_bytes(fetched.num_bytes)}"
    )
    for name in fetched.whole:
        print_line(f"{name} is whole")
    for line in _next_steps(launch, standing, exit_code):
        say(line)


def _next_steps(launch: "Launch", standing: "Standing", exit_code: int | None) -> list[str]:
    """What to type after a fetch."""
    run = shlex.quote(os.path.relpath(launch.run_directory))
    if standing in {"starting", "running"}:
        return [f"It goes on: `accel-gpt2 cloud logs {launch.name} --follow`, and fetch again."]
    steps = []
    if not launch.is_over(standing):
        steps.append(f"Its machine is still there: `accel-gpt2 cloud cancel {launch.name}`.")
    if exit_code == ExitCode.DONE:
        steps.append(f"It is trained: `accel-gpt2 evaluate {run}`, `accel-gpt2 report {run}`.")
    elif (Path(launch.run_directory) / "recipe.yaml").exists():
        steps.append(
            "It is not finished: launch it again with more budget, or go on here with "
            f"`accel-gpt2 train --recipe {run}/recipe.yaml --output-dir {run}`."
        )
    return steps


@app.command()
def cancel(name: _NameArgument, debug: DebugOption = False) -> None:
    """End a training and take its machine down."""
    from accel_gpt2.cloud.ledger import read_launch

    _end(read_launch(name))
    say(f"{name} is ended.")


def _end(launch: "Launch") -> None:
    from accel_gpt2.cloud.engines import engine_of
    from accel_gpt2.cloud.ledger import note_spent, write_launch

    engine_of(launch.engine).cancel(launch)
    if launch.state != "ended":
        note_spent(launch)
    write_launch(launch.in_state("ended", launch.exit_code))


@app.command()
def reap(yes: YesOption = False, debug: DebugOption = False) -> None:
    """End everything that was launched from here and has not ended.

    With an API key of Lambda's, machines there are listed, and those that are named as ours are
    terminated too.
    """
    from accel_gpt2.cloud.lambda_api import find_key, instances, terminate
    from accel_gpt2.cloud.ledger import NAME_PREFIX, read_launches

    left = [launch for launch in read_launches() if launch.state != "ended"]
    key = find_key()
    rented = {} if key is None else instances(key)
    orphans = {id_: name for id_, name in rented.items() if name.startswith(NAME_PREFIX)}
    for launch in left:
        print_line(f"{launch.name} ({launch.provider}), launched {launch.began}")
    for id_, name in orphans.items():
        print_line(f"{name} (Lambda's machine {id_})")
    if not left and not orphans:
        say("Nothing is left running.")
        return
    if not (yes or agreed("End all of them?")):
        return
    problems = _end_all(left)
    if key is not None and orphans:
        terminate(key, list(orphans))
    if problems:
        raise UserError("\n".join(problems))
    say(f"{len(left) + len(orphans)} ended.")


def _end_all(launches: "Sequence[Launch]") -> list[str]:
    problems = []
    for launch in launches:
        try:
            _end(launch)
        except UserError as error:
            problems.append(str(error))
    return problems
