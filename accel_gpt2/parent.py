"""The process that started this one: who it is, and ending with it."""

import ctypes
import signal
import sys

# Set for a trainer that `accel-gpt2 train` has launched, and whose exit code it reads from
# status.json: that process's id.
WAITED_FOR_BY = "ACCEL_GPT2_WAITED_FOR_BY"

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def stop_with_parent() -> None:
    """Have the kernel send this process a SIGTERM when its parent dies; Linux only."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
