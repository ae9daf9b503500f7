"""The verbs of the command line, one file each: what is not asked for is not loaded."""

import importlib
from collections.abc import Iterable
from types import MappingProxyType
from typing import Annotated

import typer

import accel_gpt2
from accel_gpt2.cli.errors import plain_app
from accel_gpt2.cli.options import DebugOption, train_command, with_train_options
from accel_gpt2.cli.output import print_line

# In the order of the help, where verbs of verbs come last.
_GROUPS = ("cost", "cloud", "configs")
VERBS = (
    *("demo", "profiles", "plan", "bench", "train", "evaluate", "predict", "report", "compare"),
    *("export", "doctor"),
    *_GROUPS,
)

# Verbs with the options of `train`, and which of those they have not.
_WITHOUT = MappingProxyType(
    {
        "plan": frozenset({"dry_run", "quiet"}),
        "bench": frozenset({"output_dir", "resume", "dry_run", "strategy"}),
    }
)


def application(verbs: Iterable[str] = VERBS) -> typer.Typer:
    """The program `accel-gpt2` with these verbs: `accel_gpt2/cli/<verb>.py` has a function of that
    name, or an `app` with verbs of its own."""
    app = plain_app(name="accel-gpt2", no_args_is_help=True)
    app.callback()(_global_options)
    for verb in verbs:
        module = importlib.import_module(f"accel_gpt2.cli.{verb}")
        if verb in _GROUPS:
            app.add_typer(module.app, name=verb)
        elif verb == "train":
            app.command()(train_command(module.start_training))
        elif verb in _WITHOUT:
            act = getattr(module, verb)
            app.command()(with_train_options(act, without=_WITHOUT[verb]))
        else:
            app.command()(getattr(module, verb))
    return app


def _show_version(show: bool) -> None:
    if show:
        print_line(f"accel-gpt2 {accel_gpt2.__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Per-class GPT-2 language models as text classifiers: train, evaluate, predict."""
