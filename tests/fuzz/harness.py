"""The real command line on bad input: what is run, and what every refusal must look like."""

import contextlib
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

# Exit codes that a refusal may have; 4, 75 and 130 are for work that was going on.
REFUSALS = (1, 2, 3)

TIME_LIMIT_SECONDS = 120  # a loaded machine takes half a minute for what takes a second
MEMORY_LIMIT_BYTES = 6 * 2**30
LONGEST_LINE = 1000
LONGEST_TALK = 6000

_LAUNCHED = {"launch/train.py": "train", "launch/evaluate.py": "evaluate"}

# What a run may write besides its results: how it ended, and who is at work in it.
_BOOKKEEPING = (
    "status.json",
    "owner.json",
    "run.lock",
    "spent.json",
    "command.txt",
    "environment.json",
)

# A shape that trains in a second: one layer of 16 channels, 32 positions.
SHAPE = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "n_positions": 32,
    "vocab_size": 300,
    "activation_function": "gelu_new",
}

WORDS = {"fruit": "apple pear plum cherry sweet ripe", "tools": "hammer nail saw drill steel grip"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One malformed input: what is typed, the files that are put there before, and the answer.

    `argv` begins with the program. `files` maps a path below the working directory to its content:
    text, bytes, a function of the path, or None for a directory. `said` is a regular expression
    for what stderr must say. `run` asks for a trained run in `run/`.
    """

    id: str
    argv: tuple[str, ...]
    said: str
    files: Mapping[str, "Content"] = field(default_factory=dict)
    environment: Mapping[str, str | None] = field(default_factory=dict)
    exit_codes: tuple[int, ...] = REFUSALS
    run: bool = False
    stdin: bytes = b""


Content = str | bytes | Callable[[Path], object] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float
    hung: bool = False


def train_argv(dataset: str, *more: str, output_dir: str = "out") -> tuple[str, ...]:
    """`launch/train.py` for one step of a very small model."""
    return (
        "launch/train.py",
        "--model=shape",
        "--init=scratch",
        f"--dataset={dataset}",
        f"--output-dir={output_dir}",
        "--max-steps=1",
        "--max-length=16",
        "--set=tokenizer=train",
        "--set=tokenizer_vocab_size=300",
        "--set=trackers=",
        "--quiet",
        *more,
    )


def good_rows(count: int = 60, *, seed: str = "") -> list[tuple[str, str]]:
    """Different documents of two classes in turn."""
    rows = []
    for number in range(count):
        label = ("fruit", "tools")[number % 2]
        words = WORDS[label].split()
        text = " ".join(words[(number * k + k) % len(words)] for k in range(1, 6))
        rows.append((f"{seed}{text} {number}", label))
    return rows


def good_csv(count: int = 60, *, seed: str = "") -> str:
    """`good_rows` as a CSV file."""
    return "text,label\n" + "".join(
        f"{text},{label}\n" for text, label in good_rows(count, seed=seed)
    )


def write_content(path: Path, content: Content) -> None:
    """Put a case's file where it belongs."""
    if content is None:
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def make_workshop(folder: Path, case: Case, run_template: Path | None) -> None:
    """The working directory of a case: a model's shape, good data, and the case's own files."""
    write_content(folder / "shape" / "config.json", json.dumps(SHAPE))
    write_content(folder / "good" / "train.csv", good_csv())
    write_content(folder / "good" / "test.csv", good_csv(8, seed="a "))
    if run_template is not None:
        shutil.copytree(run_template, folder / "run", symlinks=True)
    for name, content in case.files.items():
        write_content(folder / name, content)


def tree_digest(folder: Path) -> dict[str, str]:
    """Every path below a folder with what it is: a link's target, or a file's size and hash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            data = path.read_bytes()
            found[name] = f"{len(data)} {hashlib.blake2b(data, digest_size=16).hexdigest()}"
        else:
            found[name] = "directory" if path.is_dir() else "special"
    return found


def run_command(
    argv: tuple[str, ...],
    *,
    cwd: Path,
    environment: Mapping[str, str | None] | None = None,
    stdin: bytes = b"",
) -> Ended:
    """Run a program of the package in this process, to its exit.

    Its two streams are files of their own, as the interpreter opens them: stdout strict, stderr
    with backslashes. Whatever the command changes in the process is put back.
    """
    hung = False

    def stop_waiting(number: int, frame: FrameType | None) -> None:
        nonlocal hung
        hung = True
        raise TimeoutError(f"still at work after {TIME_LIMIT_SECONDS} s")

    started = time.monotonic()
    with (
        _working_directory(cwd),
        _variables(environment or {}),
        _offline_hub(),
        _streams(stdin) as streams,
        _signal_handlers(),
        _limited_memory(),
    ):
        signal.signal(signal.SIGALRM, stop_waiting)
        signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_SECONDS)
        previous, sys.argv = sys.argv, list(argv)
        code: object = 0
        try:
            _entry_point(argv[0])()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.argv = previous
            sys.stdout.flush()
            sys.stderr.flush()
        stdout, stderr = streams()
    assert isinstance(code, int), f"exit with {code!r}"
    return Ended(
        exit_code=code,
        stdout=stdout,
        stderr=stderr,
        seconds=time.monotonic() - started,
        hung=hung,
    )


def _entry_point(program: str) -> Callable[[], None]:
    from accel_gpt2.cli import app, evaluate, train

    return {
        "accel-gpt2": app.main,
        "launch/train.py": train.launched_main,
        "launch/evaluate.py": evaluate.launched_main,
    }[program]


@contextlib.contextmanager
def _working_directory(cwd: Path) -> Iterator[None]:
    previous = Path.cwd()
    os.chdir(cwd)
    try:
        yield
    finally:
        os.chdir(previous)


@contextlib.contextmanager
def _variables(changes: Mapping[str, str | None]) -> Iterator[None]:
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith("ACCEL_GPT2_") and name != "ACCEL_GPT2_CACHE":
            del os.environ[name]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU"):
        os.environ.pop(name, None)
    os.environ["COLUMNS"] = "80"
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _offline_hub() -> Iterator[None]:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _streams(stdin: bytes) -> Iterator[Callable[[], tuple[str, str]]]:
    before = sys.stdin, sys.stdout, sys.stderr
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        sys.stdout = open(os.dup(1), "w", encoding="utf-8")  # noqa: SIM115 -- closed below
        sys.stderr = open(  # noqa: SIM115
            os.dup(2), "w", encoding="utf-8", errors="backslashreplace", buffering=1
        )

        def read() -> tuple[str, str]:
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode("utf-8", "backslashreplace"))
            return texts[0], texts[1]

        try:
            yield read
        finally:
            sys.stdout.close()
            sys.stderr.close()
            sys.stdin, sys.stdout, sys.stderr = before
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    # A command that reads /dev/zero to its end should fail here, not take the machine with it.
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextlib.contextmanager
def _signal_handlers() -> Iterator[None]:
    numbers = (signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_EXCEPTION_NAME = re.compile(r"(^|: )[A-Za-z_.]*[a-z](Error|Exception|Warning)(: |$)", re.MULTILINE)
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def check_refusal(ended: Ended, *, said: str, exit_codes: tuple[int, ...] = REFUSALS) -> None:
    """Hold a refusal against the rules: a code of the table and a sentence that one can read."""
    told = (
        f"exit {ended.exit_code}\n--- stdout\n{ended.stdout[:500]}\n--- stderr\n"
        f"{ended.stderr[:3000]!r}"
    )
    assert not ended.hung, f"it hangs\n{told}"
    assert ended.exit_code in exit_codes, told
    assert ended.stdout == "", told
    assert "Traceback" not in ended.stderr, told
    # What no sentence was written for; a bug has shown itself.
    assert "Run again with --debug" not in ended.stderr, told
    assert not _EXCEPTION_NAME.search(ended.stderr), f"names an exception\n{told}"
    control = _CONTROL.search(ended.stderr)
    assert control is None, f"{control.group()!r} reaches the terminal\n{told}"
    lines = ended.stderr.strip().splitlines()
    assert lines, told
    assert lines[-1].endswith((".", "?", ")")), f"the last line is no sentence\n{told}"
    longest = max(map(len, lines))
    assert longest <= LONGEST_LINE, f"a line of {longest} characters\n{told}"
    assert len(ended.stderr) <= LONGEST_TALK, told
    assert re.search(said, ended.stderr), f"no match for {said!r}\n{told}"


def check_untouched(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Nothing that was there is another now; what records the failed start may be."""
    for name, digest in before.items():
        if Path(name).name in _BOOKKEEPING:
            continue
        assert after.get(name) == digest, f"{name}: {digest} has become {after.get(name)}"


def check_case(case: Case, folder: Path, run_template: Path) -> Ended:
    """Run one case in an empty folder and hold it against all rules."""
    make_workshop(folder, case, run_template if case.run else None)
    before = tree_digest(folder)
    ended = run_command(case.argv, cwd=folder, environment=case.environment, stdin=case.stdin)
    check_refusal(ended, said=case.said, exit_codes=case.exit_codes)
    check_untouched(before, tree_digest(folder))
    return ended


def check_any_outcome(ended: Ended) -> None:
    """For input that may be good after all: done, or a refusal by the rules."""
    if ended.exit_code == 0 and not ended.hung:
        assert "Traceback" not in ended.stderr, ended.stderr
        return
    check_refusal(ended, said="")
