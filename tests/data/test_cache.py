"""Cached files: built once, checked always, never half seen."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accel_gpt2.data.cache import cache_directory, cached_file, content_key
from accel_gpt2.errors import UserError


def _write(content: str, calls: list[str] | None = None):
    def build(path: Path) -> None:
        if calls is not None:
            calls.append(content)
        path.write_text(content)

    return build


def test_a_file_is_built_once() -> None:
    """The second request for a key reads what the first one built."""
    calls: list[str] = []
    first = cached_file("x", content_key(1), ".txt", _write("one", calls))
    second = cached_file("x", content_key(1), ".txt", _write("one", calls))
    assert (first, calls, second.read_text()) == (second, ["one"], "one")


@pytest.mark.parametrize("damage", [b"", b"on", b"onE", b"one and more"])
def test_a_damaged_file_is_built_again(damage: bytes) -> None:
    """An emptied, shortened, altered or lengthened file is not used."""
    path = cached_file("x", content_key(1), ".txt", _write("one"))
    path.write_bytes(damage)
    calls: list[str] = []
    again = cached_file("x", content_key(1), ".txt", _write("one", calls))
    assert calls == ["one"]
    assert again.read_text() == "one"
    assert [file.name for file in again.parent.iterdir()] == [again.name]


def test_a_failing_build_leaves_nothing(cache: Path) -> None:
    """A build that raises leaves neither a file nor a staging file behind."""

    def build(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("stopped in the middle")

    with pytest.raises(RuntimeError, match="stopped in the middle"):
        cached_file("x", content_key(1), ".txt", build)
    assert list((cache / "x").iterdir()) == []


_SLOW_BUILD = """
import sys, time
from accel_gpt2.data.cache import cached_file

def build(path):
    for part in range(20):
        with path.open("a") as file:
            file.write(f"{part}\\n")
        time.sleep(0.01)

sys.stdin.read()  # until all of them are ready
print(cached_file("x", "key", ".txt", build).read_text(), end="")
"""


def test_processes_that_build_at_once_do_no_harm(cache: Path) -> None:
    """Four processes that all find nothing and all build end with one good file."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _SLOW_BUILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.close()
        worker.stdin = None
    contents = {worker.communicate(timeout=60)[0] for worker in workers}
    assert contents == {"".join(f"{part}\n" for part in range(20))}
    assert len(list((cache / "x").iterdir())) == 1


def test_abandoned_staging_files_are_removed(cache: Path) -> None:
    """What a killed process left is removed after a day, and not before."""
    (cache / "x").mkdir(parents=True)
    old, fresh = cache / "x" / ".a.1.partial", cache / "x" / ".b.2.partial"
    for path in (old, fresh):
        path.write_text("half")
    os.utime(old, (0, time.time() - 25 * 3600))
    cached_file("x", "key", ".txt", _write("one"))
    assert (old.exists(), fresh.exists()) == (False, True)


def test_a_cache_that_is_no_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache variable that points at a file ends in a sentence with the variable's name."""
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(file))
    with pytest.raises(
        UserError, match=r"cannot be written .* name another folder with ACCEL_GPT2"
    ):
        cached_file("x", "key", ".txt", _write("one"))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own variable wins over XDG_CACHE_HOME, which wins over ~/.cache."""
    monkeypatch.setenv("ACCEL_GPT2_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_directory() == Path("/a")
    monkeypatch.delenv("ACCEL_GPT2_CACHE")
    assert cache_directory() == Path("/b/accel-gpt2")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "accel-gpt2"
