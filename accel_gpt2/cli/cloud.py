"""`cloud`: run a training on a rented machine, within a budget, and see what is running there."""

import dataclasses
import datetime
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accel_gpt2.catalog.engines import CLOUDS
from accel_gpt2.catalog.gpus import GPUS
from accel_gpt2.cli.errors import plain_app
from accel_gpt2.cli.options import (
    DebugOption,
    DryRunOption,
    JsonOption,
    TrainOptions,
    given_layers,
    typed_words,
    with_train_options,
)
from accel_gpt2.cli.output import print_json, print_line, print_table, say, warn
from accel_gpt2.errors import DoesNotFitError, ExitCode, UsageError, UserError
from accel_gpt2.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from accel_gpt2.cloud.engine import Engine, Wish
    from accel_gpt2.cloud.ledger import Launch
    from accel_gpt2.plan.cost import CostQuote
    from accel_gpt2.plan.search import Option
    from accel_gpt2.recipe import Layer, TrainRecipe
    from accel_gpt2.render.cloud import CloudJob

app = plain_app(no_args_is_help=True)

_NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="As `accel-gpt2 cloud status` lists it.")
]
_YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.callback()
def cloud(debug: DebugOption = False) -> None:
    """Train on a rented GPU, within a budget."""


def engine_of(name: str) -> "Engine":
    """The engine of this name in the catalog."""
    from accel_gpt2.cloud.hf_jobs import HfJobsEngine
    from accel_gpt2.cloud.local import LocalEngine
    from accel_gpt2.cloud.skypilot import SkyPilotEngine

    engines: dict[str, type[Engine]] = {
        "skypilot": SkyPilotEngine,
        "hf-jobs": HfJobsEngine,
        "local": LocalEngine,
    }
    return engines[name]()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """All that is known before anything is started. `option` is None where hours were given."""

    job: "CloudJob"
    quote: "CostQuote"
    recipe: "TrainRecipe"
    option: "Option | None"
    run_directory: Path
    files: dict[str, str]  # of the launch directory, by name
    shipped: dict[str, Path]  # local data and models, by their path in the upload
    sources: Path | None


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
    yes: _YesOption = False,
    json: JsonOption = False,
) -> None:
    """Train on a rented machine, and fetch the results.

    Shows the plan, the price and what will be typed, and asks. The training stops, saved, when 95%
    of the budget are spent, and the machine is taken down when it ends. Exit codes are those of the
    training.
    """
    from accel_gpt2.cloud.engine import Wish, find_cloud, offered_gpu
    from accel_gpt2.render.cloud import kept_minutes

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
    layers, recipe = _given(options)
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
    option = None if hours is not None else _planned(layers, row.provider, gpu, num_gpus)
    wish = dataclasses.replace(wish, gpu=gpu, run_seconds=_run_seconds(hours, option))
    engine = engine_of(row.engine)
    prepared = _prepare(options, recipe, option, engine, wish, budget, bucket, package)
    if json:
        print_json(_document(prepared))
    else:
        _show(prepared, contents=dry_run)
    spent, estimate = prepared.job.spent_usd, prepared.quote.usd_total
    if spent + estimate > budget:
        before = f"{_usd(spent)} are spent, and it" if spent else "It"
        raise DoesNotFitError(
            f"{before} is expected to cost {_usd(estimate)}{' more' if spent else ''}, which "
            f"exceeds --budget {budget:g}: give --budget {_enough(spent + estimate)}, or train "
            "less, for instance by --max-steps."
        )
    if not dry_run and (yes or _agreed(f"Start it, for up to {_usd(budget)}?")):
        raise typer.Exit(_start(prepared, engine))


app.command()(
    with_train_options(
        launch,
        without={"profile", "max_time", "budget_usd", "resume", "dry_run", "quiet"},
    )
)


def _own_gpu(gpu: str | None) -> str:
    if gpu is not None:
        raise UsageError("--provider local is this machine as it is: leave --gpu out.")
    return "this machine"


def _given(options: TrainOptions) -> "tuple[list[Layer], TrainRecipe]":
    from accel_gpt2.recipe import resolve

    layers = given_layers(options)
    recipe = resolve(layers).recipe
    for key in ("budget_usd", "price_usd_per_hour"):
        if getattr(recipe, key) is not None:
            raise UsageError(f"{key} is given in the recipe: give --budget and leave it out.")
    return layers, recipe


def _planned(layers: "list[Layer]", provider: str, gpu: str, num_gpus: int) -> "Option":
    """What `train` will do there.

    Raises:
        DoesNotFitError: when nothing fits.
        UsageError: when its time cannot be known.
    """
    from accel_gpt2.cli.cost import rented_profile
    from accel_gpt2.cli.hardware import detect_hardware, planned_profile
    from accel_gpt2.cli.planning import does_not_fit, plan_here

    if provider == "local":
        profile = planned_profile("auto", detect_hardware)
    else:
        profile = rented_profile(gpu, num_gpus)
    plan = plan_here(layers, profile, depth="none")
    if plan is None:
        raise UsageError("The shape of this model is not known here: give --hours.")
    if plan.recommended is None:
        raise DoesNotFitError(does_not_fit(plan))
    return plan.recommended


def _run_seconds(hours: float | None, option: "Option | None") -> int:
    if hours is not None:
        if not hours > 0:
            raise UsageError(f"--hours {hours:g} is no time to train for: give hours, as in 3.")
        return max(1, round(hours * 3600))
    assert option is not None
    if option.seconds is None:
        raise UsageError(
            "How long it trains is not known before the data set has been read, or for a machine "
            "whose speed is unknown: give --hours."
        )
    return max(1, round(option.seconds.expected))


def _prepare(
    options: TrainOptions,
    recipe: "TrainRecipe",
    option: "Option | None",
    engine: "Engine",
    wish: "Wish",
    budget: float,
    bucket: str | None,
    package: str | None,
) -> _Prepared:
    from accel_gpt2.classify.spending import spent_usd
    from accel_gpt2.cli.run_directory import default_run_directory
    from accel_gpt2.cloud.engine import find_sources, upload_directory
    from accel_gpt2.cloud.ledger import NAME_PREFIX
    from accel_gpt2.render.cloud import CloudJob

    sources = find_sources() if package is None else None
    if package is None and sources is None:
        raise UsageError(
            "This is an installed accel-gpt2, and no package index has it: say what the machine is "
            "to install, for instance --package git+https://...@<commit>."
        )
    quote = engine.quote(wish)
    run_directory = (options.output_dir or default_run_directory(recipe)).absolute()
    words, shipped = _machine_words(options, recipe)
    slug = "".join(x if x.isalnum() else "-" for x in run_directory.name.lower())[:24].strip("-")
    name = f"{NAME_PREFIX}{slug}-{secrets.token_hex(2)}"
    job = CloudJob(
        name=name,
        cloud=wish.cloud,
        gpu=quote.gpu,
        num_gpus=wish.num_gpus,
        usd_per_hour=round(quote.usd_per_hour, 6),
        budget_usd=budget,
        words=tuple(words),
        run_directory=str(run_directory),
        uploaded=str(upload_directory(name)),
        package=package or "./package",
        bucket=str(Path(bucket).absolute()) if bucket and wish.cloud.engine == "local" else bucket,
        spot=wish.spot,
        spent_usd=round(spent_usd(run_directory), 4),
    )
    return _Prepared(
        job=job,
        quote=quote,
        recipe=recipe,
        option=option,
        run_directory=run_directory,
        files=engine.render(job),
        shipped=shipped,
        sources=sources,
    )


def _machine_words(
    options: TrainOptions, recipe: "TrainRecipe"
) -> tuple[list[str], dict[str, Path]]:
    """What to type after `train` there, and the local files that it names, by their place there.

    What was set in the environment is typed: the machine has not got it.
    """
    from accel_gpt2.recipe import Layer, environment_layer

    layers = list(options.layers)
    typed = {key for layer in layers for key in layer.values}
    layers += [
        Layer(origin="--set", values={key: value})
        for key, value in environment_layer().values.items()
        if key not in typed
    ]
    shipped: dict[str, Path] = {}
    for key, folder in (("dataset", "data"), ("model", "models"), ("tokenizer", "models")):
        path = Path(str(getattr(recipe, key))).expanduser()
        if os.path.exists(path):
            there = f"{folder}/{path.resolve().name}"
            shipped[there] = path
            layers = [_without(layer, key) for layer in layers]
            layers.append(Layer(origin="--set", values={key: f"./{there}"}))
    recipe_file = options.recipe_file
    if recipe_file is not None:
        shipped[recipe_file.name] = recipe_file
        recipe_file = Path(recipe_file.name)
    there_options = dataclasses.replace(
        options,
        layers=tuple(layer for layer in layers if layer.values),
        recipe_file=recipe_file,
        output_dir=None,
    )
    return typed_words(there_options), shipped


def _without(layer: "Layer", key: str) -> "Layer":
    values = {name: value for name, value in layer.values.items() if name != key}
    return dataclasses.replace(layer, values=values)


def _document(prepared: _Prepared) -> dict[str, object]:
    job, quote, option = prepared.job, prepared.quote, prepared.option
    return {
        "name": job.name,
        "provider": job.cloud.provider,
        "gpu": job.gpu,
        "num_gpus": job.num_gpus,
        "usd_per_hour": job.usd_per_hour,
        "usd_total": quote.usd_total,
        "budget_usd": job.budget_usd,
        "run_seconds": quote.run_seconds,
        "setup_seconds": quote.setup_seconds,
        "spent_usd": job.spent_usd,
        "left_seconds": job.left_seconds,
        "as_of": quote.as_of.isoformat(),
        "source": quote.source,
        "plan": None if option is None else option.label,
        "memory_bytes": None if option is None else option.device.expected,
        "verdict": None if option is None else option.verdict,
        "run_directory": str(prepared.run_directory),
        "train_command": job.train_command,
        "uploads": [*(["package"] if prepared.sources else []), *prepared.shipped],
        "files": prepared.files,
    }


def _show(prepared: _Prepared, *, contents: bool) -> None:
    """Data: what would happen, with the files' contents or only their places."""
    from accel_gpt2.cloud.ledger import launch_directory

    job, quote, option = prepared.job, prepared.quote, prepared.option
    machine = f"{job.num_gpus} x {job.gpu}" if job.num_gpus > 1 else job.gpu
    spot = ", spot" if job.spot else ""
    spent = f", of which {_usd(job.spent_usd)} are spent" if job.spent_usd else ""
    training = format_seconds(quote.run_seconds)
    rows = {
        "Training": f"{prepared.recipe.model} on {prepared.recipe.dataset}",
        "Machine": f"{machine} from {job.cloud.provider}{spot}, as {job.name}",
        "Plan": _fit(option) if option is not None else "not planned, because --hours is given",
        "Time": f"{training}, and {format_seconds(quote.setup_seconds)} around it",
        "Price": f"${quote.usd_per_hour:g} an hour ({quote.as_of}, {quote.source})",
        "Estimate": f"{_usd(quote.usd_total)} of a budget of {_usd(job.budget_usd)}{spent}",
        "Ends": f"after {format_seconds(max(0, job.left_seconds))} at the latest, saved",
        "Results": str(prepared.run_directory),
    }
    if job.kept is not None:
        rows["Kept"] = f"{job.bucket}, every few minutes"
    for title, text in rows.items():
        print_line(f"{title:<9} {text}")
    for name, text in prepared.files.items():
        if contents:
            print_line(f"\n# {name}\n{text.rstrip()}")
        elif name != "command.txt":
            print_line(f"{'File':<9} {launch_directory(job.name) / name}")
    if not contents:
        print_line("$ " + prepared.files["command.txt"].strip().replace("\n", "\n$ "))
    if quote.freshness != "fresh":
        warn(f"The price is {quote.age_days} days old; `accel-gpt2 cost refresh` asks for today's.")
    if job.spot:
        warn("Managed spot jobs run from a small machine of SkyPilot's, which costs extra.")


def _fit(option: "Option") -> str:
    usable = option.memory.usable_bytes
    there = "" if usable is None else f" of {format_bytes(usable)}"
    memory = f"{format_bytes(option.device.expected)}{there}"
    return f"{option.label}; {memory} ({option.verdict})"


def _usd(amount: float) -> str:
    return f"${amount:.2f}" if amount >= 0.01 else f"${amount:.4f}"


def _enough(estimate: float) -> str:
    """A budget in which an estimate fits, with the part that is kept back; a cent at least.

    >>> _enough(5.0)
    '5.75'
    """
    return f"{max(0.01, estimate * 1.15):.2f}"


def _agreed(question: str) -> bool:
    """Ask at the terminal.

    Raises:
        UsageError: when nobody is there.
    """
    if not sys.stdin.isatty():
        raise UsageError("This spends money, and nobody can be asked here: give --yes.")
    return typer.confirm(question, err=True)


def _start(prepared: _Prepared, engine: "Engine") -> int:
    """Write down what is about to be started, start it, and stay until it has ended."""
    from accel_gpt2.cloud.engine import fill_upload
    from accel_gpt2.cloud.ledger import Launch, launch_directory, write_launch
    from accel_gpt2.durable import write_text

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
        code = engine.submit(job, record)
    except UserError:
        _note_what_is_left(engine, record)
        raise
    except KeyboardInterrupt:
        say(
            f"{job.name} goes on. `accel-gpt2 cloud logs {job.name}` follows it, `accel-gpt2 cloud "
            f"cancel {job.name}` ends it."
        )
        raise
    write_launch(record.in_state("ended", code))
    shutil.rmtree(upload, ignore_errors=True)
    _say_ending(prepared, code)
    return code


def _note_what_is_left(engine: "Engine", record: "Launch") -> None:
    """After a failed start: ended where the engine is sure that nothing of it is there."""
    from accel_gpt2.cloud.ledger import write_launch

    try:
        if engine.status(record) in _OVER:
            write_launch(record.in_state("ended", int(ExitCode.FAILED)))
            return
    except UserError as error:
        say(str(error))
    warn(f"{record.name} may be there and cost money: `accel-gpt2 cloud reap` ends it.")


_OVER = ("succeeded", "failed", "cancelled", "gone")


def _say_ending(prepared: _Prepared, code: int) -> None:
    from accel_gpt2.classify.spending import spent_usd

    job = prepared.job
    spent = _usd(spent_usd(prepared.run_directory))
    outcome = {
        int(ExitCode.DONE): "Trained",
        int(ExitCode.LIMIT_REACHED): "Stopped by the budget, saved",
        int(ExitCode.STOPPED): "Stopped by a signal, saved",
    }.get(code, f"Ended with exit code {code}")
    where = job.bucket if job.spot else prepared.run_directory
    say(f"{outcome}: about {spent} of {_usd(job.budget_usd)} spent; results in {where}.")


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
        if launch.is_overdue and standing not in _OVER:
            warn(f"{launch.name} should have ended: `accel-gpt2 cloud cancel {launch.name}`.")


def _standing(launch: "Launch") -> str:
    if launch.state == "ended":
        return "ended" if launch.exit_code is None else f"ended ({launch.exit_code})"
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
    from accel_gpt2.cloud.ledger import read_launch

    launch = read_launch(name)
    engine_of(launch.engine).logs(launch, follow=follow)


@app.command()
def cancel(name: _NameArgument, debug: DebugOption = False) -> None:
    """End a training and take its machine down."""
    from accel_gpt2.cloud.ledger import read_launch

    _end(read_launch(name))
    say(f"{name} is ended.")


def _end(launch: "Launch") -> None:
    from accel_gpt2.cloud.ledger import write_launch

    engine_of(launch.engine).cancel(launch)
    write_launch(launch.in_state("ended", launch.exit_code))


@app.command()
def reap(yes: _YesOption = False, debug: DebugOption = False) -> None:
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
    if not (yes or _agreed("End all of them?")):
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
