"""The console script `accel-gpt2`, which loads what was asked for and no more."""

import gc
import sys

import accel_gpt2
from accel_gpt2.cli.errors import run
from accel_gpt2.cli.output import print_line


def main() -> None:
    """Run what was typed, to its exit code."""
    run(_answer)


def _answer(*, standalone_mode: bool) -> object:
    words = sys.argv[1:]
    if words == ["--version"]:  # before the libraries that read a command line
        print_line(f"accel-gpt2 {accel_gpt2.__version__}")
        return None
    gc.disable()  # what imports make stays; looking for garbage in it takes a tenth of the time
    try:
        from accel_gpt2.cli.verbs import VERBS, application

        # Whatever does not start with a verb is for all of them to answer: help, or a complaint.
        app = application(words[:1] if words and words[0] in VERBS else VERBS)
        if words[:1] != ["plan"]:  # which is done before there is much to collect
            gc.enable()
        return app(standalone_mode=standalone_mode)
    finally:
        gc.enable()
