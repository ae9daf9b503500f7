"""Errors that are written to the person at the keyboard, and the exit codes of every command."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended, for scripts and schedulers."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    DOES_NOT_FIT = 3
    LIMIT_REACHED = 4  # a budget or time limit was reached and the work is saved
    STOPPED = 75  # stopped by a signal and saved: start again to go on (EX_TEMPFAIL)
    INTERRUPTED = 130  # Ctrl-C before anything was worth saving


class UserError(Exception):
    """A failure that the user can act on: what we saw, what we needed, what to type next.

    It is printed as its text alone, without a traceback, and ends the command with `exit_code`.
    """

    exit_code: ExitCode = ExitCode.FAILED


class UsageError(UserError):
    """The command, a recipe or an option is wrong as it was typed."""

    exit_code = ExitCode.USAGE


class DoesNotFitError(UserError):
    """The machine has not got what the choice needs."""

    exit_code = ExitCode.DOES_NOT_FIT


class StoppedEarly(Exception):
    """The work was stopped on purpose and is saved; `exit_code` says why."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(word: str, known: list[str] | tuple[str, ...], *, cutoff: float = 0.6) -> str:
    """Return " Did you mean 'x'?" for the closest known word, or an empty string.

    >>> nearest("learning_rat", ["learning_rate", "seed"])
    " Did you mean 'learning_rate'?"
    >>> nearest("zzz", ["learning_rate", "seed"])
    ''
    """
    import difflib

    # Longer words than this are no slip, and comparing them takes seconds.
    matches = difflib.get_close_matches(word[:100], known, n=1, cutoff=cutoff)
    return f" Did you mean {matches[0]!r}?" if matches else ""
