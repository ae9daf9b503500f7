"""A whole run under watch: what it opens, makes and renames, and what it unpickles."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fuzz.harness import tree_digest

REPOSITORY = Path(__file__).parents[2]

# Runs in a process of its own, because an audit hook stays until the end.
_WATCHED = """
import json, os, shutil, sys, types
from pathlib import Path

sys.modules["tests"] = types.ModuleType("tests")  # a library ships a package of that name
sys.modules["tests"].__path__ = [sys.argv[2]]
from tests.fuzz.harness import Case, make_workshop, run_command, train_argv

here = Path.cwd()
make_workshop(here, Case(id="", argv=(), said=""), None)
events = []
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.mkdir", "os.remove", "os.chmod", "os.truncate",
           "os.rmdir", "shutil.rmtree", "os.chown", "os.utime", "os.mkfifo"}

def path(value, folder=-1):
    # shutil.rmtree names files by their folder's descriptor.
    folder = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
    return os.path.abspath(os.path.join(folder, os.fsdecode(value)))

def hook(event, args):
    if event == "pickle.find_class":
        events.append([event, f"{args[0]}.{args[1]}"])
    elif event == "open" and not isinstance(args[0], int) and args[2] & WRITING:
        events.append([event, path(args[0])])
    elif event in {"os.rename", "os.symlink", "os.link"}:
        # What a symbolic link says is no place that is written to.
        events.extend([event, path(name)] for name in args[event == "os.symlink" : 2])
    elif event in CHANGES and not isinstance(args[0], int):
        folder = args[-1] if event in {"os.remove", "os.rmdir", "os.mkdir", "os.chmod"} else -1
        events.append([event, path(args[0], folder)])

sys.addaudithook(hook)
argv = tuple("--set=trackers=tensorboard" if word == "--set=trackers=" else word
             for word in train_argv("good", output_dir="run"))
codes = [run_command(argv, cwd=here).exit_code]
shutil.rmtree("run/class-0-fruit/final")
for command in (argv, ("accel-gpt2", "evaluate", "run"), ("accel-gpt2", "predict", "run", "a pear"),
                ("accel-gpt2", "report", "run")):
    codes.append(run_command(command, cwd=here).exit_code)
import torch, io, pickle
seen = len(events)
pickle.loads(pickle.dumps(Path("x")))  # the hook does see what it is there for
events_of_the_run, check = events[:seen], events[seen:]
Path(sys.argv[1]).write_text(json.dumps(
    {"codes": codes, "events": events_of_the_run, "check": check}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What happened during training, going on, evaluating, predicting and reporting.

    `events` are (event, path or name) of Python's audit hooks; `check` are those of one pickle that
    was read on purpose.
    """

    folder: Path  # the working directory; home and tmp lie in it
    events: tuple[tuple[str, str], ...]
    check: tuple[tuple[str, str], ...]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """One run, its home and its temporary folder in a place of their own."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    folder = tmp_path_factory.mktemp("watched")
    work = folder / "work"
    for name in ("work", "home", "tmp"):
        (folder / name).mkdir()
    found = folder / "found.json"
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("ACCEL_GPT2_", "XDG_", "HF_", "MPL", "TORCHINDUCTOR"))
    }
    subprocess.run(
        [sys.executable, "-c", _WATCHED, str(found), str(REPOSITORY / "tests")],
        cwd=work,
        env={
            **environment,
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "ACCEL_GPT2_CACHE": str(folder / "cache"),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        check=True,
        timeout=300,
    )
    content = json.loads(found.read_text())
    assert content["codes"] == [0] * 5
    return Watched(
        folder=folder,
        events=tuple((event, value) for event, value in content["events"]),
        check=tuple((event, value) for event, value in content["check"]),
    )


def test_a_whole_run_unpickles_nothing(watched: Watched) -> None:
    """Python's unpickler looks up no class from training to report, with a start that goes on from
    a checkpoint (torch's weights-only reader is another, which builds tensors and plain values)."""
    assert [name for event, name in watched.events if event == "pickle.find_class"] == []
    assert ("pickle.find_class", "pathlib.PosixPath") in watched.check


def test_a_whole_run_writes_where_it_was_told_to(watched: Watched) -> None:
    """Training, going on, evaluating, predicting and reporting write below the run directory, the
    cache and the temporary folder; in the home only matplotlib keeps its list of fonts."""
    allowed = [watched.folder / name for name in ("work/run", "cache", "tmp")]
    allowed += [watched.folder / "home" / name for name in (".config", ".cache")]
    writes = [
        (event, path)
        for event, path in watched.events
        if event != "pickle.find_class" and not path.startswith("/dev/")
    ]
    assert len(writes) >= 100
    outside = [
        (event, path)
        for event, path in writes
        if not any(Path(path).is_relative_to(root) for root in allowed)
    ]
    assert outside == []
    # Native code (arrow, safetensors, tokenizers) has no hook: so what is there afterwards counts.
    assert sorted(path.name for path in (watched.folder / "work").iterdir()) == [
        "good",
        "run",
        "shape",
    ]
    assert sorted(tree_digest(watched.folder / "work" / "good")) == ["test.csv", "train.csv"]
    home = [path for path in (watched.folder / "home").rglob("*") if path.is_file()]
    assert [path.parent.name for path in home] == ["matplotlib"] * len(home)


def test_nothing_planted_is_left_executable(watched: Watched) -> None:
    """No file of a run or of the cache can be executed."""
    files = [
        path
        for root in (watched.folder / "work" / "run", watched.folder / "cache")
        for path in root.rglob("*")
        if path.is_file()
    ]
    assert len(files) >= 40
    assert [path for path in files if path.stat().st_mode & 0o111] == []
