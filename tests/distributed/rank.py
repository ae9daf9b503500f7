"""A rank's whole life, run by its path in a process that `harness` has forked."""

import contextlib
import ctypes
import faulthandler
import gc
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import torch


def main(
    pipe: Connection, environment: dict[str, str], output: str, work: bytes, timeout_seconds: float
) -> None:
    """Do the work, send what came of it, and leave when told to; it never returns."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.register(signal.SIGUSR2, file)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no test, no rank
    os.environ.update(environment)
    torch.set_num_threads(1)
    gc.freeze()  # what the imports made is no garbage, and looking through it takes long
    ours = ModuleType("tests")
    ours.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["tests"] = ours
    try:
        function, args = pickle.loads(work)
        message = (True, function(*args))
    except BaseException:
        message = (False, traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):
        pipe.send_bytes(pickle.dumps(message))
        pipe.poll(timeout_seconds)  # who leaves before the others breaks what they still exchange
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's destructor now and then never returns


if __name__ == "rank":
    main(*ARGUMENTS)  # noqa: F821 -- which `harness` has put here
