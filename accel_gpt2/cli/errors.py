"""How a command ends: every exception becomes one text and one exit code, here and nowhere else."""

import io
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accel_gpt2.cli.output import check_ranks, is_main_process, say
from accel_gpt2.errors import ExitCode, StoppedEarly, UsageError
from accel_gpt2.failures import ending, is_expected, is_told
from accel_gpt2.terminal import printable, shortened

if TYPE_CHECKING:
    import typer

_show_traceback = False


def show_tracebacks(show: bool) -> bool:
    """`--debug`, before or after the verb: a failure comes with its traceback."""
    global _show_traceback
    _show_traceback = _show_traceback or show
    return show


def outcome(error: BaseException | None) -> tuple[int, str]:
    """The exit code of a command that ended with `error`, and the text for the person.

    >>> from accel_gpt2.errors import UserError
    >>> outcome(None), outcome(UserError("The folder x does not exist."))
    ((0, ''), (1, 'The folder x does not exist.'))
    >>> outcome(ZeroDivisionError("division by zero"))[1]
    'ZeroDivisionError: division by zero. Run again with --debug for the traceback.'
    """
    if error is None:
        return int(ExitCode.DONE), ""
    import typer

    match error:
        case typer.Abort():
            return int(ExitCode.INTERRUPTED), "Interrupted."
        case typer.Exit():
            return error.exit_code, ""
        case _ if hasattr(error, "show") and hasattr(error, "format_message"):
            said = io.StringIO()  # the argument parser's own: usage, hint, and what is wrong
            error.show(file=said)
            text = said.getvalue().strip()
            return int(ExitCode.USAGE), text if text.endswith((".", "?")) else f"{text}."
        case _ if is_expected(error) or is_told(error):
            return ending(error)
        case _:
            code, reason = ending(error)
            return code, f"{reason}. Run again with --debug for the traceback."


def plain_app(name: str | None = None, *, no_args_is_help: bool = False) -> "typer.Typer":
    """A Typer application whose failures come to `run`, and whose help reads well at any width.

    Typer's panels cut long option names at 80 columns and cost 0.1 s; plain help does neither.
    """
    import typer

    return typer.Typer(
        name=name,
        no_args_is_help=no_args_is_help,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def run(app: Callable[..., Any]) -> None:
    """Run a command line, a Typer application or what starts one, and leave with its exit code.

    The text of a failure goes to stderr. Of several launched processes only the first one prints
    what all of them have met; an unexpected failure is printed by whoever has it.
    """
    global _show_traceback
    _show_traceback = False
    _open_streams()
    threading.excepthook = _thread_failed
    try:
        check_ranks()
    except UsageError as error:  # which process may talk is unknown, so this one does
        sys.stderr.write(printable(f"{shortened(str(error))}\n"))
        sys.exit(int(error.exit_code))
    try:
        code = app(standalone_mode=False) or ExitCode.DONE
    except SystemExit as exit_:
        code = outcome(exit_)[0]
    except BaseException as error:
        code = report(error)
    code = _after_flush(code)
    if code != ExitCode.DONE and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The teardown of a process group can wait for processes that are gone.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """A thread of a library that met a full disk: the sentence, since the main thread will too."""
    error = failure.exc_value
    if error is not None and is_expected(error) and not _show_traceback:
        sys.stderr.write(printable(f"{outcome(error)[1]}\n"))
    else:
        threading.__excepthook__(failure)


def _open_streams() -> None:
    """Let stdout take every text: bytes of a file name that are not UTF-8 go out as they came.

    A stream that was closed before we were started (`>&-`) is one that nobody reads.
    """
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 -- open until the end
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def report(error: BaseException) -> int:
    """Tell the person how the command ended, unless it has been told; returns the exit code."""
    code, text = outcome(error)
    text = shortened(text)
    expected = is_expected(error)
    if is_told(error) or not text:
        pass
    elif not expected and not is_main_process():
        sys.stderr.write(printable(f"Process {os.environ.get('RANK', '?')}: {text}\n"))
    elif not isinstance(error, StoppedEarly):
        say(text, style="red")
    else:
        say(text)
    if _show_traceback and (is_main_process() or not expected):
        traceback.print_exception(error)
    return code


def _after_flush(code: int) -> int:
    # A reader that has gone away (`| head`) is no failure of ours, and no reason to complain.
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        say(f"The output cannot be written: {error.strerror}.", style="red")
        return code or int(ExitCode.FAILED)
    return code
