"""`cloud launch`: train on a rented machine, within a budget."""

import dataclasses
import datetime
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accel_gpt2.catalog.engines import CLOUDS
from accel_gpt2.catalog.gpus import GPUS
from accel_gpt2.cli.cloud_output import format_usd, launch_document, show_launch
from accel_gpt2.cli.cloud_prepare import (
    Prepared,
    given_recipe,
    planned_option,
    prepare,
    run_seconds_of,
)
from accel_gpt2.cli.options import DryRunOption, JsonOption, TrainOptions
from accel_gpt2.cli.output import print_json, say, warn
from accel_gpt2.errors import DoesNotFitError, ExitCode, UsageError, UserError

if TYPE_CHECKING:
    from accel_gpt2.cloud.engine import Engine
    from accel_gpt2.cloud.ledger import Launch

YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def launch(
    options: TrainOptions,
    *,
    provider: Annotated[str, typer.Option(help=f"Whose machine: {', '.join(CLOUDS)}.")],
    budget: Annotated[
        float, typer.Option(help="US dollars for everything, earlier attempts of the run included.")
    ],
    gpu: Annotated[
        str | None, typer.Option(help=f"A catalog name: {', '.join(GPUS)}. Not for local.")
    ] = None,
    num_gpus: Annotated[int, typer.Option(min=1, help="Of that kind, in one machine.")] = 1,
    spot: Annotated[
        bool, typer.Option("--spot", help="Cheaper, may be taken away; needs --bucket.")
    ] = False,
    bucket: Annotated[
        str | None,
        typer.Option(
            help="Keep checkpoints in this bucket of the provider's (hf-jobs: <user>/<name>; "
            "local: a directory), also while the training goes on."
        ),
    ] = None,
    hours: Annotated[
        float | None, typer.Option(help="How long it trains. [default: by plan]")
    ] = None,
    usd_per_hour: Annotated[
        float | None,
        typer.Option(help="What the whole machine costs. [default: by the price list]"),
    ] = None,
    package: Annotated[
        str | None,
        typer.Option(
            metavar="REQUIREMENT",
            help="What the machine installs, for instance git+https://...@<commit>. [default: "
            "this checkout, uploaded]",
        ),
    ] = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    json: JsonOption = False,
) -> None:
    """Train on a rented machine, and fetch the results.

    Shows the plan, the price and what will be typed, and asks. The training stops, saved, when 95%
    of the budget are spent, and the machine is taken down when it ends. Exit codes are those of the
    training.
    """
    from accel_gpt2.cloud.engine import Wish, find_cloud, offered_gpu
    from accel_gpt2.cloud.engines import engine_of
    from accel_gpt2.render.cloud_job import kept_minutes

    row = find_cloud(provider)
    if not budget > 0:
        raise UsageError(f"--budget {budget:g} buys nothing: give what it may cost, in dollars.")
    if usd_per_hour is not None and not usd_per_hour > 0:
        raise UsageError(f"--usd-per-hour {usd_per_hour:g} is no price: leave it out, or give one.")
    if provider == "local":
        gpu = _own_gpu(gpu)
    elif gpu is None:
        raise UsageError(f"Which GPU? Give --gpu, one of {', '.join(row.gpus)} from {provider}.")
    if num_gpus > 1 and row.engine == "hf-jobs":
        raise UsageError(
            f"--num-gpus {num_gpus}: Hugging Face jobs are rented with one GPU here; leave it out, "
            "or give another --provider."
        )
    if spot and (row.store is None or bucket is None):
        able = ", ".join(x.provider for x in CLOUDS.values() if x.store is not None)
        raise UsageError(
            "--spot needs somewhere to go on from when the machine is taken away: give --bucket, "
            f"with a --provider that mounts one ({able})."
        )
    if bucket is not None and not row.has_buckets:
        raise UsageError(f"No bucket can be mounted on machines of {provider}: leave --bucket out.")
    if bucket is None and row.engine == "hf-jobs":
        raise UsageError(
            "The disk of a Hugging Face job is gone when it ends: give --bucket <user>/<name> "
            "(`hf buckets create <name>` makes one)."
        )
    layers, recipe = given_recipe(options)
    wish = Wish(
        cloud=row,
        gpu=gpu,
        num_gpus=num_gpus,
        run_seconds=1,
        spot=spot,
        usd_per_hour=usd_per_hour,
        kept_seconds=60 * kept_minutes(row, bucket),
    )
    gpu = offered_gpu(wish)
    option = None if hours is not None else planned_option(layers, row.provider, gpu, num_gpus)
    wish = dataclasses.replace(wish, gpu=gpu, run_seconds=run_seconds_of(hours, option))
    engine = engine_of(row.engine)
    prepared = prepare(options, recipe, option, engine, wish, budget, bucket, package)
    if json:
        print_json(launch_document(prepared))
    else:
        show_launch(prepared, contents=dry_run)
    spent, estimate = prepared.job.spent_usd, prepared.quote.usd_total
    if spent + estimate > budget:
        before = f"{format_usd(spent)} are spent, and it" if spent else "It"
        raise DoesNotFitError(
            f"{before} is expected to cost {format_usd(estimate)}{' more' if spent else ''}, which "
            f"exceeds --budget {budget:g}: give --budget {_enough(spent + estimate)}, or train "
            "less, for instance by --max-steps."
        )
    if dry_run:
        return
    check_none_runs(prepared.run_directory)
    if yes or agreed(f"Start it, for up to {format_usd(budget)}?"):
        raise typer.Exit(_start(prepared, engine))


def check_none_runs(run_directory: Path) -> None:
    """Refuse a second machine for one run: both would write what the other has.

    Raises:
        UserError: naming the launch that has not ended.
    """
    from accel_gpt2.cloud.ledger import read_launches

    for launch in read_launches():
        if launch.run_directory == str(run_directory) and launch.state != "ended":
            raise UserError(
                f"{launch.name} trains this run, as far as is known here: `accel-gpt2 cloud fetch "
                f"{launch.name}` looks and brings what there is, `accel-gpt2 cloud cancel "
                f"{launch.name}` ends it."
            )


def _own_gpu(gpu: str | None) -> str:
    if gpu is not None:
        raise UsageError("--provider local is this machine as it is: leave --gpu out.")
    return "this machine"


def _enough(estimate: float) -> str:
    """A budget in which an estimate fits, with the part that is kept back; a cent at least.

    >>> _enough(5.0)
    '5.75'
    """
    return f"{max(0.01, estimate * 1.15):.2f}"


def agreed(question: str) -> bool:
    """Ask at the terminal.

    Raises:
        UsageError: when nobody is there.
    """
    if not sys.stdin.isatty():
        raise UsageError("This spends money, and nobody can be asked here: give --yes.")
    return typer.confirm(question, err=True)


def _start(prepared: Prepared, engine: "Engine") -> int:
    """Write down what is about to be started, start it, and stay until it has ended."""
    from accel_gpt2.cloud.engine import fill_upload
    from accel_gpt2.cloud.ledger import Launch, launch_directory, note_spent, write_launch
    from accel_gpt2.durable import write_text

    engine.check()
    job = prepared.job
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    record = Launch(
        name=job.name,
        engine=job.cloud.engine,
        provider=job.cloud.provider,
        gpu=job.gpu,
        num_gpus=job.num_gpus,
        usd_per_hour=job.usd_per_hour,
        budget_usd=job.budget_usd,
        began=now.isoformat(),
        deadline=(now + datetime.timedelta(seconds=job.left_seconds)).isoformat(),
        run_directory=job.run_directory,
        bucket=job.bucket,
        spot=job.spot,
        state="submitting",
    )
    write_launch(record)  # before anything can cost money
    upload = Path(job.uploaded)
    fill_upload(
        upload,
        sources=prepared.sources,
        files=prepared.shipped,
        run_directory=prepared.run_directory if prepared.run_directory.is_dir() else None,
    )
    for name, text in prepared.files.items():
        write_text(launch_directory(job.name) / name, text)
    say(f"Starting {job.name}; its record is in {launch_directory(job.name)}.")
    try:
        trained = engine.submit(job, record)
    except UserError:
        _note_what_is_left(engine, record)
        raise
    except KeyboardInterrupt:
        say(
            f"{job.name} goes on. `accel-gpt2 cloud logs {job.name}` follows it, `accel-gpt2 cloud "
            f"cancel {job.name}` ends it."
        )
        raise
    code = int(ExitCode.FAILED) if trained is None else trained
    write_launch(record.in_state("ended", code))
    note_spent(record)
    shutil.rmtree(upload, ignore_errors=True)
    _say_ending(prepared, trained)
    return code


def _note_what_is_left(engine: "Engine", record: "Launch") -> None:
    """After a failed start: ended where the engine is sure that nothing of it is there."""
    from accel_gpt2.cloud.ledger import note_spent, write_launch

    try:
        if record.is_over(engine.status(record)):
            write_launch(record.in_state("ended", int(ExitCode.FAILED)))
            note_spent(record)
            return
    except UserError as error:
        say(str(error))
    warn(f"{record.name} may be there and cost money: `accel-gpt2 cloud reap` ends it.")


def _say_ending(prepared: Prepared, code: int | None) -> None:
    from accel_gpt2.classify.spending import spent_usd

    job = prepared.job
    spent = format_usd(spent_usd(prepared.run_directory))
    outcome = {
        None: "The machine was set up in vain, as is said above",
        int(ExitCode.DONE): "Trained",
        int(ExitCode.LIMIT_REACHED): "Stopped by the budget, saved",
        int(ExitCode.STOPPED): "Stopped by a signal, saved",
    }.get(code, f"Ended with exit code {code}")
    say(
        f"{outcome}: about {spent} of {format_usd(job.budget_usd)} spent; results in "
        f"{prepared.run_directory}."
    )
