"""A whole run under watch: what it opens, makes and renames, and what it unpickles."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Runs in a process of its own, because an audit hook stays until the end.
_WATCHED = """
import json, os, shutil, sys
from pathlib import Path
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


@pytest.fixture(scope="session")
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
        [sys.executable, "-c", _WATCHED, str(found)],
        cwd=work,
        env={
            **environment,
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "ACCEL_GPT2_CACHE": str(folder / "cache"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(REPOSITORY),
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


@pytest.fixture(scope="session")
def run_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained run, as the tests of malformed input damage it."""
    from tests.fuzz.conftest import train_template

    return train_template(tmp_path_factory)
