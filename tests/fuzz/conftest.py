"""A trained run to damage, and the number of examples of the short and of the long form."""

import functools
from pathlib import Path

import pytest

from tests.fuzz.harness import Case, make_workshop, run_command, train_argv

NOTHING = Case(id="nothing", argv=("accel-gpt2",), said="")


@pytest.fixture(scope="session")
def run_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of two classes, trained and evaluated through the command line."""
    return train_template(tmp_path_factory.getbasetemp())


@functools.cache
def train_template(base: Path) -> Path:
    """Train and evaluate it, once for all tests of a process, below a folder of theirs."""
    folder = base / "template"
    folder.mkdir()
    make_workshop(folder, NOTHING, None)
    cache = {"ACCEL_GPT2_CACHE": str(folder / "cache")}
    argv = train_argv("good", "--set=keep_checkpoints=1", output_dir="run")
    for command in (argv, ("accel-gpt2", "evaluate", "run", "--quiet")):
        ended = run_command(command, cwd=folder, environment=cache)
        assert ended.exit_code == 0, ended.stderr
    return folder / "run"


@pytest.fixture
def num_examples(request: pytest.FixtureRequest) -> int:
    """How many generated inputs one test takes: few, or with --torture many."""
    return 300 if request.config.getoption("--torture", default=False) else 6
