"""Copies of a run directory: only what changed, manifests last, nothing lost on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accel_gpt2.classify.spending import note_launch, read_ledger
from accel_gpt2.cloud.keep import copy_run


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


RUN = {
    "recipe.yaml": "seed: 1\n",
    "log.jsonl": "{}\n",
    "class-0-a/checkpoint-5/manifest.json": "five",
    "class-0-a/checkpoint-5/state.json": "state",
}


def test_a_copy_goes_on_where_the_run_was(tmp_path: Path) -> None:
    """There and back again, without links, locks and what is being written."""
    run, kept, again = tmp_path / "run", tmp_path / "kept", tmp_path / "again"
    _write(run, {**RUN, "run.lock": "", "owner.json": "{}", ".staging-log": "half"})
    _write(run, {"class-0-a/.staging-checkpoint-6/state.json": "half"})
    (run / "class-0-a" / "best").symlink_to("checkpoint-5")
    assert copy_run(run, kept) == 4
    assert _files(kept) == RUN
    assert copy_run(kept, again) == 4
    assert _files(again) == RUN


def test_only_what_changed_is_copied_again(tmp_path: Path) -> None:
    """A bucket charges for writing; and what was rotated away here goes there too."""
    run, kept = tmp_path / "run", tmp_path / "kept"
    _write(run, RUN)
    copy_run(run, kept)
    assert copy_run(run, kept) == 0
    _write(run, {"log.jsonl": "{}\n{}\n", "class-0-a/checkpoint-6/manifest.json": "six"})
    for name in ("manifest.json", "state.json"):
        (run / "class-0-a" / "checkpoint-5" / name).unlink()
    assert copy_run(run, kept) == 2
    assert _files(kept) == _files(run)
    assert not (kept / "class-0-a" / "checkpoint-5").exists()
    os.utime(kept / "log.jsonl", (1, 1))  # as long, but older: it is not the same
    assert copy_run(run, kept) == 1


def test_a_manifest_comes_after_what_it_vouches_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a copy breaks off, no checkpoint looks whole that is not, and no file is gone."""
    run, kept = tmp_path / "run", tmp_path / "kept"
    _write(kept, {"class-0-a/checkpoint-4/manifest.json": "four"})
    _write(run, RUN)
    order: list[str] = []

    def breaking_copy(source: Path, target: Path) -> None:
        if source.name == "manifest.json":
            raise OSError(5, "Input/output error")
        order.append(source.name)
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr("accel_gpt2.cloud.keep.shutil.copyfile", breaking_copy)
    with pytest.raises(OSError, match="Input/output error"):
        copy_run(run, kept)
    assert set(order) == {"recipe.yaml", "log.jsonl", "state.json"}
    assert (kept / "class-0-a" / "checkpoint-4" / "manifest.json").exists()


def test_an_empty_source_takes_nothing_away(tmp_path: Path) -> None:
    """A run that has not begun, or a bucket that is not mounted, is not what a copy should be."""
    kept = tmp_path / "kept"
    _write(kept, RUN)
    assert copy_run(tmp_path / "nothing", kept) == 0
    assert _files(kept) == RUN


def test_it_copies_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """--every, as the run script uses it; SIGTERM ends it with 0."""
    run, kept = tmp_path / "run", tmp_path / "kept"
    _write(run, RUN)
    argv = [sys.executable, "-m", "accel_gpt2.cloud.keep", str(run), str(kept), "--every", "0.1"]
    process = subprocess.Popen(argv)
    try:
        for _ in range(600):
            if (kept / "class-0-a" / "checkpoint-5" / "manifest.json").exists():
                break
            time.sleep(0.1)
        assert _files(kept) == RUN
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_ledgers_are_put_together(tmp_path: Path) -> None:
    """What is noted in either is in both afterwards: a launch that failed here, a machine there."""
    run, kept = tmp_path / "run", tmp_path / "kept"
    _write(kept, RUN)
    for folder, launch in ((run, "accel-gpt2-a-here"), (kept, "accel-gpt2-a-there")):
        note_launch(folder, launch, seconds=600, usd_per_hour=2.0)
    copy_run(kept, run)
    assert [row.launch for row in read_ledger(run)] == ["accel-gpt2-a-here", "accel-gpt2-a-there"]
    copy_run(run, kept)
    assert read_ledger(kept) == read_ledger(run)
    (kept / "spent.json").unlink()
    copy_run(kept, run)
    assert len(read_ledger(run)) == 2
