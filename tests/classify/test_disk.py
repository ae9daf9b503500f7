"""Full and read-only disks: real ones, mounted for a test, that change under a run."""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from accel_gpt2.classify import part_training
from accel_gpt2.classify.fit import fit
from accel_gpt2.cli.errors import outcome
from accel_gpt2.errors import ExitCode
from accel_gpt2.train.checkpoint import list_checkpoints
from accel_gpt2.train.manifest import verify

from .conftest import resolve_tiny
from .runs import assert_same_models

_IN_NAMESPACE = "ACCEL_GPT2_TEST_IN_NAMESPACE"

_CLONE_NEWNS = 0x20000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND = 0x1, 0x20, 0x1000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18


class Disk:
    """A file system in memory of a size that can change, seen by this process alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _own_mounts()
        path.mkdir()
        _mount("tmpfs", path, "tmpfs", 0, "size=4k")
        self._read_only = False

    def resize(self, num_bytes: int) -> None:
        _mount("tmpfs", self.path, "tmpfs", _MS_REMOUNT, f"size={num_bytes}")

    def make_read_only(self) -> None:
        # Mounted over itself first: a file that is open for writing, as a run's lock is, keeps a
        # mount from becoming read-only.
        _mount(str(self.path), self.path, "none", _MS_BIND, "")
        _mount("none", self.path, "none", _MS_REMOUNT | _MS_BIND | _MS_RDONLY, "")
        self._read_only = True

    def make_writable(self) -> None:
        if self._read_only:
            _unmount(self.path)
            self._read_only = False

    def leave_free(self, num_bytes: int) -> None:
        """Fill the disk up to so much, in whole pages."""
        free = shutil.disk_usage(self.path).free
        (self.path / "filler").write_bytes(bytes(max(0, free - num_bytes)))

    def make_room(self) -> None:
        (self.path / "filler").unlink(missing_ok=True)
        self.resize(2**30)

    def close(self) -> None:
        self.make_writable()
        _unmount(self.path)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def _own_mounts() -> None:
    """Mounts of this process are its own, and gone with it however it ends."""
    if _libc().unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNS)")
    _mount("none", Path("/"), "none", _MS_REC | _MS_PRIVATE, "")


def _mount(
    source: str | None, target: Path, kind: str | None, flags: int, data: str | None
) -> None:
    texts = [None if x is None else x.encode() for x in (source, str(target), kind, data)]
    if _libc().mount(texts[0], texts[1], texts[2], flags, texts[3]) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target} ({data})")


def _unmount(target: Path) -> None:
    lazily = 2  # whatever is still open there
    if _libc().umount2(str(target).encode(), lazily) != 0:
        raise OSError(ctypes.get_errno(), f"umount {target}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small disk; without the right to mount one, the tests run in a namespace that has it."""
    if sys.platform != "linux":
        pytest.skip("needs Linux: a tmpfs is mounted")
    try:
        mounted = Disk(tmp_path / "disk")
    except OSError as error:
        pytest.skip(f"no right to mount here ({error}); see test_without_the_right_to_mount")
    yield mounted
    mounted.close()


def test_without_the_right_to_mount() -> None:
    """Whoever may not mount runs this file in a user namespace, where root is nobody else."""
    if sys.platform != "linux":
        pytest.skip("needs Linux: a tmpfs is mounted")
    if _IN_NAMESPACE in os.environ:
        pytest.skip("this is that namespace")
    try:
        _own_mounts()
    except OSError as error:
        reason = str(error)
    else:
        pytest.skip("the tests have mounted themselves")
    tried = subprocess.run(["unshare", "-Urm", "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {reason}; unshare -Urm: {tried.stderr.strip()}")
    pytest_line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    inside = subprocess.run(
        ["unshare", "-Urm", *pytest_line, "-rs", "--import-mode=importlib", __file__],
        env={**os.environ, _IN_NAMESPACE: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert inside.returncode == 0, inside.stdout + inside.stderr
    assert inside.stdout.count("SKIPPED") == 1, inside.stdout


def _ends_with_a_sentence(error: BaseException, *words: str) -> None:
    """The error fails the command with one sentence that holds these words."""
    code, text = outcome(error)
    assert code == ExitCode.FAILED
    assert not re.search(r"\n|--debug|Errno", text), text
    for word in (*words, "start again to go on."):
        assert word in text, text


def _at_save(monkeypatch: pytest.MonkeyPatch, number: int, work: Callable[[int], None]) -> None:
    """Call `work(bytes needed)` between the free-space check of a save and its writing."""
    from accel_gpt2.train import checkpoint

    real = checkpoint._check_free_space
    saves = 0

    def check(directory: Path, num_bytes: int) -> None:
        nonlocal saves
        saves += 1
        real(directory, num_bytes)
        if saves == number:
            work(num_bytes)

    monkeypatch.setattr(checkpoint, "_check_free_space", check)


def _assert_intact(run: Path) -> None:
    """What there is is whole, and a save that failed has left nothing."""
    found = [path for folder in run.glob("class-*") for path in list_checkpoints(folder)]
    assert found, "the run had saved"
    for path in found:
        verify(path)
    assert not list(run.rglob(".staging-*"))


def test_a_disk_too_small_for_the_next_checkpoint(
    disk: Disk, trained_run: Path, texts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before training and again before the write; with room the run ends as ever."""
    resolved = resolve_tiny(texts_file)
    run = disk.path / "run"
    disk.resize(9 * 2**20)  # a checkpoint and a half
    with pytest.raises(Exception, match=r"The next checkpoint needs .* MiB are free") as failed:
        fit(resolved, run, quiet=True)
    _ends_with_a_sentence(failed.value, "make room")
    warning = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("Warning"))
    assert "make room before it stops for lack of it" in warning
    assert [len(list_checkpoints(folder)) for folder in sorted(run.glob("class-*"))] == [1, 0, 0]
    _assert_intact(run)
    disk.make_room()
    fit(resolved, run, quiet=True)
    assert_same_models(run, trained_run)


# Of a checkpoint's bytes, how many find room: the weights fail, the optimizer, the last files.
@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.6, 0.994], ids=str)
def test_a_disk_that_fills_up_during_a_save(
    disk: Disk,
    trained_run: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    fraction: float,
) -> None:
    """The save fails in one sentence, the checkpoint before it stays, and the run goes on."""
    resolved = resolve_tiny(texts_file)
    run = disk.path / "run"
    disk.resize(2**30)
    with monkeypatch.context() as patch:
        _at_save(patch, 2, lambda needed: disk.leave_free(int(fraction * needed)))
        with pytest.raises(Exception, match="No space left on device") as failed:
            fit(resolved, run, quiet=True)
    _ends_with_a_sentence(failed.value, "checkpoint-12 could not be written", "make room")
    _assert_intact(run)
    disk.make_room()
    fit(resolved, run, quiet=True)
    assert_same_models(run, trained_run)


def test_a_disk_that_becomes_read_only_before_a_save(
    disk: Disk, trained_run: Path, texts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux makes a disk that fails: said in one sentence, and gone on from when writable."""
    resolved = resolve_tiny(texts_file)
    run = disk.path / "run"
    disk.resize(2**30)
    with monkeypatch.context() as patch:
        _at_save(patch, 2, lambda needed: disk.make_read_only())
        with pytest.raises(Exception, match="Read-only file system") as failed:
            fit(resolved, run, quiet=True)
    _ends_with_a_sentence(failed.value, "checkpoint-12 could not be written", "writable")
    _assert_intact(run)
    with pytest.raises(Exception, match="Read-only file system") as failed:
        fit(resolved, run, quiet=True)
    _ends_with_a_sentence(failed.value, "writable")
    disk.make_writable()
    fit(resolved, run, quiet=True)
    assert_same_models(run, trained_run)


@pytest.mark.parametrize("what", ["full", "nearly full", "read-only"])
def test_a_log_that_cannot_be_written(
    disk: Disk, trained_run: Path, texts_file: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A row of log.jsonl in the middle of a class fails; what was saved before is gone on from."""
    resolved = resolve_tiny(texts_file)
    run = disk.path / "run"
    disk.resize(2**30)
    real = part_training.append_json_line
    steps: list[object] = []

    def append(path: Path, row: dict[str, object]) -> None:
        steps.append(row["step"])
        if row["event"] == "step" and row["step"] == 9:
            if what == "read-only":
                disk.make_read_only()
            else:
                disk.leave_free(0)
                # Of its last page nothing is left, or a part of the row.
                path.write_bytes(b"x" * (4096 if what == "full" else 4090))
        real(path, row)

    with monkeypatch.context() as patch:
        patch.setattr(part_training, "append_json_line", append)
        with pytest.raises(Exception, match=r"No space left|Read-only file system") as failed:
            fit(resolved, run, quiet=True)
    _ends_with_a_sentence(failed.value)
    assert steps[-1] == 9, "the row that was lost, not the one after it"
    _assert_intact(run)
    disk.make_writable()
    disk.make_room()
    fit(resolved, run, quiet=True)
    assert_same_models(run, trained_run)


# The thread prints its traceback before the run hears of it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_trackers_on_a_full_disk(disk: Disk, texts_file: Path, tmp_path: Path) -> None:
    """TensorBoard's writer has a thread of its own; its failure ends the run in a sentence too."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "trackers").symlink_to(disk.path)
    disk.resize(8192)  # a folder for the events of a few rows
    with pytest.raises(Exception, match="No space left") as failed:
        fit(resolve_tiny(texts_file, trackers=["tensorboard"]), run, quiet=True)
    _ends_with_a_sentence(failed.value, "make room")


@pytest.mark.parametrize("pages", [1, 2, 4, 8, 16, 32, 64])
def test_a_disk_too_small_to_begin(disk: Disk, texts_file: Path, pages: int) -> None:
    """recipe.yaml, the tokenizer, plan.json, the card: whatever has no room, it is a sentence."""
    disk.resize(pages * 4096)
    with pytest.raises(Exception, match=r"No space left|are free") as failed:
        fit(resolve_tiny(texts_file), disk.path / "run", quiet=True)
    _ends_with_a_sentence(failed.value, "make room")
    assert not list(disk.path.rglob(".staging-*"))
    disk.make_room()
    fit(resolve_tiny(texts_file, max_steps=1), disk.path / "run", resume="never", quiet=True)
