"""What the machine does to us, told in a sentence with an exit code of the table."""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs
import pytest
import torch
from safetensors.torch import save_file

from accel_gpt2.cli.errors import outcome
from accel_gpt2.errors import DoesNotFitError, ExitCode, StoppedEarly, UsageError, UserError
from accel_gpt2.failures import ending, is_expected, is_told, machine_failure, mark_as_told

FULL = Path("/dev/full")  # Linux's disk that has no room


def _write_full() -> None:
    with FULL.open("wb", buffering=0) as file:
        file.write(b"x")


def _write_full_with_pyarrow() -> None:
    with pyarrow.fs.LocalFileSystem().open_output_stream(str(FULL)) as stream:
        stream.write(b"x")


def _write_full_with_torch() -> None:
    with FULL.open("wb", buffering=0) as file:
        torch.save({"a": torch.zeros(4)}, file)


def _write_too_large_with_safetensors(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        save_file({"a": torch.zeros(4)}, folder / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _open_too_many() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        while True:
            files.append(Path(os.devnull).open())  # noqa: SIM115 -- closed below
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _failed(work: Callable[[], object]) -> BaseException:
    try:
        work()
    except BaseException as error:
        return error
    raise AssertionError("it went well")


@pytest.mark.skipif(not FULL.exists(), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize("write", [_write_full, _write_full_with_pyarrow, _write_full_with_torch])
def test_a_full_disk_is_a_sentence_whoever_writes(write: Callable[[], None]) -> None:
    """Python, pyarrow in C++ and torch's writer: one sentence, exit code 1, no traceback."""
    error = _failed(write)
    code, message = outcome(error)
    assert code == ExitCode.FAILED
    assert message.startswith("No space left on device")
    assert message.endswith("What was saved before is intact; make room and start again to go on.")
    assert is_expected(error)


def test_too_many_open_files_are_a_sentence(tmp_path: Path) -> None:
    """From Python, and from a library in Rust, whose error has only the number in its text."""
    work: list[Callable[[], None]] = [
        _open_too_many,
        lambda: _write_too_large_with_safetensors(tmp_path),
    ]
    for one in work:
        code, message = outcome(_failed(one))
        assert code == ExitCode.FAILED
        assert message.startswith("Too many open files")
        assert "raise the limit on open files (`ulimit -n 65536`) and start again" in message


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EDQUOT, "make room within the quota"),
        (errno.EROFS, "make the file system writable"),
        (errno.EIO, "check the disk and its connection"),
    ],
)
def test_what_a_disk_may_answer_is_a_sentence(number: int, advice: str) -> None:
    """Quotas, read-only and dying disks, also where another error was made of it."""
    error = OSError(number, os.strerror(number), "runs/a/log.jsonl")
    wrapped = RuntimeError("could not write")
    wrapped.__cause__ = error
    for one in (error, wrapped):
        code, message = outcome(one)
        assert code == ExitCode.FAILED
        assert message.startswith(f"{os.strerror(number)}: runs/a/log.jsonl. What was saved")
        assert advice in message


@pytest.mark.parametrize(
    ("use", "who", "asked"),
    [
        (lambda: bytearray(2**60), "machine", None),
        (lambda: torch.empty(2**50), "machine", "4096 TiB more"),
    ],
)
def test_exhausted_memory_does_not_fit(
    use: Callable[[], object], who: str, asked: str | None
) -> None:
    """Python's and torch's own errors on the CPU: exit code 3, and what makes it smaller."""
    code, message = outcome(_failed(use))
    assert code == ExitCode.DOES_NOT_FIT
    assert message.startswith(f"The {who} ran out of memory")
    assert (asked or ". What was saved before is intact") in message
    assert "--set micro_batch_tokens=..." in message


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 15.6"
        ),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_an_exhausted_gpu_does_not_fit(error: Exception) -> None:
    """What CUDA, its allocator and its libraries say of it is one thing."""
    code, message = outcome(error)
    assert code == ExitCode.DOES_NOT_FIT
    assert message.startswith("The GPU ran out of memory")
    assert ("asked for 20.00 MiB more" in message) == ("20.00" in str(error))


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        ValueError("memory"),
    ],
)
def test_other_failures_stay_what_they_are(error: Exception) -> None:
    """A mistake of ours is not blamed on the machine, and its traceback is offered."""
    assert machine_failure(error) is None
    assert not is_expected(error)
    code, message = outcome(error)
    assert code == ExitCode.FAILED
    assert message.startswith(type(error).__name__)
    assert message.endswith("Run again with --debug for the traceback.")


def test_what_has_its_own_words_keeps_them() -> None:
    """A UserError that came of a full disk says more than the disk does."""
    error = UserError("The run directory a cannot be written.")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert machine_failure(error) is None
    assert ending(error) == (1, "The run directory a cannot be written.")
    stopped = StoppedEarly("Stopped by SIGTERM.", ExitCode.STOPPED)
    assert [ending(one)[0] for one in (stopped, UsageError(""), DoesNotFitError(""))] == [75, 2, 3]
    assert ending(SystemExit(7)) == (7, "")
    assert ending(SystemExit(None)) == (0, "")
    assert ending(SystemExit("no")) == (1, "no")
    assert ending(KeyboardInterrupt()) == (130, "Interrupted.")


def test_who_has_been_told_is_not_offered_a_traceback() -> None:
    """Whoever has printed a traceback marks the error, and the status then has the plain reason."""
    error = ZeroDivisionError("x")
    assert not is_told(error)
    mark_as_told(error)
    assert is_told(error)
    assert outcome(error) == (1, "ZeroDivisionError: x")
