"""How a process ended, for whoever waits for it: an exit code and a sentence, from any exception.

The machine's own failures (a full disk, no memory left) come from anywhere: from us, torch, pyarrow
or a library in Rust. They are told apart here, by what they have in common.
"""

import errno
import os
import re

from accel_gpt2.durable import os_error_in
from accel_gpt2.errors import DoesNotFitError, ExitCode, StoppedEarly, UserError
from accel_gpt2.terminal import shortened
from accel_gpt2.units import format_bytes

# What to do about a failure that the operating system reports.
_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within the quota",
    errno.EROFS: "make the file system writable",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EIO: "check the disk and its connection (`dmesg` tells)",
    errno.EMFILE: "raise the limit on open files (`ulimit -n 65536`)",
    errno.ENFILE: "close what else has files open on this machine",
}

# By name and text, because the code that meets them must not load torch.
_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't|not enough)|CUDA( error:)? out of memory|_STATUS_ALLOC_FAILED"
)


def machine_failure(error: BaseException) -> UserError | None:
    """What a failure of the machine means to the person; None when it is another failure.

    >>> print(machine_failure(OSError(28, "No space left on device", "runs/a/log.jsonl")))
    No space left on device: runs/a/log.jsonl. What was saved before is intact; make room and \
start again to go on.
    >>> machine_failure(MemoryError()).exit_code, machine_failure(ValueError("28"))
    (<ExitCode.DOES_NOT_FIT: 3>, None)
    """
    if isinstance(error, UserError | StoppedEarly | KeyboardInterrupt | SystemExit):
        return None
    found = os_error_in(error)
    on_gpu = type(error).__name__ == "OutOfMemoryError" or "CUDA" in str(error)
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or _OUT_OF_MEMORY.search(str(error))
        or (found is not None and found.errno == errno.ENOMEM)
    ):
        return DoesNotFitError(
            f"The {'GPU' if on_gpu else 'machine'} ran out of memory{_asked_for(error)}. What was "
            "saved before is intact; start again to go on, with --gradient-checkpointing or a "
            "smaller --set micro_batch_tokens=... (neither changes the result)."
        )
    if found is None or found.errno not in _ADVICE:
        return None
    where = f": {found.filename}" if found.filename else ""
    return UserError(
        f"{os.strerror(found.errno)}{where}. What was saved before is intact; "
        f"{_ADVICE[found.errno]} and start again to go on."
    )


def _asked_for(error: BaseException) -> str:
    asked = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
    if asked is None:
        return ""
    size = format_bytes(int(asked[1])) if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
    return f" (it was asked for {size} more)"


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code of a process that ends with `error`, and the sentence for the person.

    >>> ending(UserError("The folder x does not exist."))
    (1, 'The folder x does not exist.')
    >>> ending(ZeroDivisionError("division by zero"))
    (1, 'ZeroDivisionError: division by zero')
    """
    machine = machine_failure(error)
    match machine or error:
        case UserError() | StoppedEarly() as known:
            return int(known.exit_code), str(known)
        case KeyboardInterrupt():
            return int(ExitCode.INTERRUPTED), "Interrupted."
        case SystemExit() as left:
            if left.code is None or isinstance(left.code, int):
                return left.code or 0, ""
            return int(ExitCode.FAILED), str(left.code)
        case _:
            text = shortened(" ".join(str(error).split()).rstrip("."))
            name = type(error).__name__
            return int(ExitCode.FAILED), f"{name}: {text}" if text else name


def is_expected(error: BaseException) -> bool:
    """Whether the sentence says it all, so that a traceback would only hide it."""
    expected = isinstance(error, UserError | StoppedEarly | KeyboardInterrupt | SystemExit)
    return expected or machine_failure(error) is not None


_TOLD = "_accel_gpt2_told"


def mark_as_told(error: BaseException) -> None:
    """Note that the person has been told of an error, for whoever reports it on its way out."""
    setattr(error, _TOLD, True)


def is_told(error: BaseException) -> bool:
    """Whether `mark_as_told` was called."""
    return getattr(error, _TOLD, False)
