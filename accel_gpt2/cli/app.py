"""The command line: one file per verb, put together here; what is heavy loads when a verb runs."""

from typing import Annotated

import typer

import accel_gpt2
from accel_gpt2.cli.bench import bench
from accel_gpt2.cli.cloud import app as cloud
from accel_gpt2.cli.compare import compare
from accel_gpt2.cli.configs import app as configs
from accel_gpt2.cli.cost import app as cost
from accel_gpt2.cli.demo import demo
from accel_gpt2.cli.doctor import doctor
from accel_gpt2.cli.errors import plain_app, run
from accel_gpt2.cli.evaluate import evaluate
from accel_gpt2.cli.export import export
from accel_gpt2.cli.options import DebugOption, train_command, with_train_options
from accel_gpt2.cli.output import print_line
from accel_gpt2.cli.plan import plan
from accel_gpt2.cli.predict import predict
from accel_gpt2.cli.profiles import profiles
from accel_gpt2.cli.report import report
from accel_gpt2.cli.train import start_training

app = plain_app(name="accel-gpt2", no_args_is_help=True)


def _show_version(show: bool) -> None:
    if show:
        print_line(f"accel-gpt2 {accel_gpt2.__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Per-class GPT-2 language models as text classifiers: train, evaluate, predict."""


app.command()(demo)
app.command()(profiles)
app.command()(with_train_options(plan, without={"dry_run", "quiet"}))
app.command()(with_train_options(bench, without={"output_dir", "resume", "dry_run", "strategy"}))
app.command()(train_command(start_training))
app.command()(evaluate)
app.command()(predict)
app.command()(report)
app.command()(compare)
app.command()(export)
app.add_typer(cost, name="cost")
app.add_typer(cloud, name="cloud")
app.add_typer(configs, name="configs")
app.command()(doctor)


def main() -> None:
    """The console script `accel-gpt2`."""
    run(app)
