"""Running other people's programs: what is typed, what they answer, and how long they may take."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from accel_gpt2.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How a program ended; `stdout` is empty where it went to the terminal."""

    exit_code: int
    stdout: str


# A command line, the seconds that it may take, and whether its stdout is kept; else it is talk.
Runner = Callable[[Sequence[str], float, bool], Answer]

# SkyPilot reports what is launched to its makers unless told otherwise.
_QUIETLY = {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}


def run_program(argv: Sequence[str], seconds: float, keep_stdout: bool) -> Answer:
    """Run a program to its end.

    Raises:
        UserError: when it is not there, or takes longer than it may; it is killed then.
    """
    try:
        process = subprocess.Popen(
            list(argv),
            env={**_QUIETLY, **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if keep_stdout else 2,
            start_new_session=keep_stdout,  # a Ctrl-C is for what is watched, not for a question
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise UserError(f"The program {argv[0]} cannot be run: {error.strerror}.") from None
    try:
        stdout, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _kill(process, group=keep_stdout)
        raise UserError(
            f"`{Path(argv[0]).name} {' '.join(argv[1:3])} ...` did not end within {seconds:.0f} s "
            "and was killed."
        ) from None
    return Answer(exit_code=process.returncode, stdout=stdout or "")


def _kill(process: "subprocess.Popen[str]", *, group: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
