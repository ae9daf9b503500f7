"""Files and folders have the modes that the user's umask gives, none more and none less."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fuzz.harness import Case, make_workshop, run_command, train_argv

pytestmark = pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """For a while."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_modes_follow_the_umask(mask: int, tmp_path: Path) -> None:
    """Every file of a run and of the cache is 0666 less the umask, every folder 0777 less it:
    checkpoints, final models, scores, reports, trackers, cached documents and tokens."""
    make_workshop(tmp_path, Case(id="", argv=(), said=""), None)
    environment = {"ACCEL_GPT2_CACHE": str(tmp_path / "cache")}
    argv = tuple(
        "--set=trackers=tensorboard" if word == "--set=trackers=" else word
        for word in train_argv("good", output_dir="run")
    )
    with umask(mask):
        for command in (argv, ("accel-gpt2", "evaluate", "run", "--quiet")):
            ended = run_command(command, cwd=tmp_path, environment=environment)
            assert ended.exit_code == 0, ended.stderr
    modes: dict[str, int] = {}
    for root in (tmp_path / "run", tmp_path / "cache"):
        for path in (root, *root.rglob("*")):
            if not path.is_symlink():
                wanted = 0o777 if path.is_dir() else 0o666
                mode = stat.S_IMODE(path.stat().st_mode)
                modes[str(path.relative_to(tmp_path))] = mode ^ (wanted & ~mask)
    assert len(modes) >= 60
    assert {path: oct(difference) for path, difference in modes.items() if difference} == {}
