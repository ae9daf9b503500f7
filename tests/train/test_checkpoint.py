"""Checkpoints are whole or not there."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from accel_gpt2.errors import UserError
from accel_gpt2.train.checkpoint import (
    Identity,
    TrainState,
    list_checkpoints,
    newest_checkpoint,
    point_best_at,
    read_checkpoint,
    read_state,
    rotate,
    save_checkpoint,
    set_aside_newer,
    verify,
)

IDENTITY = Identity(
    class_index=0, class_name="a", data_fingerprint="d", tokenizer_fingerprint="t", recipe={}
)


def _save(folder: Path, step: int) -> Path:
    folder.mkdir(exist_ok=True)
    weight = torch.nn.Parameter(torch.full((4, 3), float(step)))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return save_checkpoint(
        folder,
        state=TrainState(step=step, tokens=10 * step),
        identity=IDENTITY,
        weights={"w": weight.detach()},
        optimizer={"optimizer": optimizer.state_dict(), "scaler": None},
        random_states=[{"cpu": torch.get_rng_state()}],
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """State, weights, optimizer and random state come back as they were."""
    directory = _save(tmp_path / "c", 7)
    checkpoint = read_checkpoint(directory)
    assert checkpoint.state == TrainState(step=7, tokens=70)
    assert checkpoint.identity == IDENTITY
    assert checkpoint.optimizer["optimizer"]["state"][0]["step"] == 1
    assert torch.equal(checkpoint.random_states[0]["cpu"], torch.get_rng_state())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda d: (d / "state.json").write_text("{}"), r"state.json has 2 bytes"),
        (lambda d: (d / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda d: (d / "manifest.json").write_text("{"), "cannot be read"),
        (
            lambda d: (d / "manifest.json").write_text('{"format_version": 1, "files": []}'),
            "cannot be read",
        ),
        (
            lambda d: (d / "manifest.json").write_text('{"format_version": 9, "files": {}}'),
            "format 9",
        ),
    ],
    ids=["missing", "truncated", "no-manifest", "broken-manifest", "odd-manifest", "other-format"],
)
def test_damage_is_named_and_the_older_one_is_used(tmp_path, damage, message) -> None:
    """A damaged newest checkpoint never shadows a good one, and the message names the file."""
    old, new = _save(tmp_path / "c", 1), _save(tmp_path / "c", 2)
    damage(new)
    with pytest.raises(UserError, match=message):
        verify(new)
    checkpoint, problems = newest_checkpoint(tmp_path / "c")
    assert checkpoint == old
    assert len(problems) == 1
    verify(old)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    """A path that leaves the checkpoint is refused, also where its hash is right."""
    directory = _save(tmp_path / "c", 1)
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((directory / "manifest.json").read_text())
    digest = hashlib.sha256(b"x").hexdigest()
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": digest}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="secret leads out of it"):
        verify(directory)


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    """The last N and the best stay, staging folders of a crash go, `best` still points right."""
    folder = tmp_path / "c"
    for step in (1, 2, 3, 4, 5):
        _save(folder, step)
        if step == 2:
            point_best_at(folder / "checkpoint-2")
    (folder / ".staging-checkpoint-6-123").mkdir()
    rotate(folder, keep=2, best_step=2)
    assert [path.name for path in list_checkpoints(folder)] == [
        "checkpoint-5",
        "checkpoint-4",
        "checkpoint-2",
    ]
    assert read_state(folder / "best")[0].step == 2
    assert not list(folder.glob(".staging*"))


def test_a_crash_in_the_middle_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails while writing, the step has no checkpoint and the earlier one is intact."""
    _save(tmp_path / "c", 1)
    real = torch.save

    def fails(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(UserError, match="No space left on device"):
        _save(tmp_path / "c", 2)
    assert [path.name for path in list_checkpoints(tmp_path / "c")] == ["checkpoint-1"]
    assert not list((tmp_path / "c").glob(".staging*"))
    verify(tmp_path / "c" / "checkpoint-1")


def test_too_little_room_is_said_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less free space than the checkpoint needs, nothing is touched."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="1000 B are free"):
        _save(tmp_path / "c", 1)
    assert not list((tmp_path / "c").iterdir())


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    """A stop in an evaluation saves the step that a checkpoint may already have."""
    _save(tmp_path / "c", 3)
    _save(tmp_path / "c", 3)
    assert [path.name for path in list_checkpoints(tmp_path / "c")] == ["checkpoint-3"]
    verify(tmp_path / "c" / "checkpoint-3")


def test_a_replacement_that_was_cut_off_is_undone(tmp_path: Path) -> None:
    """Killed between the two renames of a replacement, the earlier checkpoint comes back."""
    saved = _save(tmp_path / "c", 3)
    saved.replace(saved.with_name(".staging-replaced-checkpoint-3"))
    assert newest_checkpoint(tmp_path / "c") == (saved, [])


def test_a_damaged_newer_checkpoint_does_not_rotate_good_ones_away(tmp_path: Path) -> None:
    """Set aside, it does not count among the newest, so that what is written next stays."""
    folder = tmp_path / "c"
    _save(folder, 2)
    (_save(folder, 8) / "state.json").unlink()
    found, _ = newest_checkpoint(folder)
    assert found == folder / "checkpoint-2"
    set_aside_newer(folder, 2)
    _save(folder, 3)
    rotate(folder, keep=1, best_step=-1)
    assert list_checkpoints(folder) == [folder / "checkpoint-3"]
    assert (folder / "superseded-checkpoint-8").is_dir()


@pytest.mark.parametrize("limit_bytes", [100, 800], ids=["weights", "optimizer"])
def test_a_write_that_fails_half_way_is_one_sentence(tmp_path: Path, limit_bytes: int) -> None:
    """safetensors and torch have errors of their own for it; nothing is left behind."""
    import resource
    import signal

    (tmp_path / "c").mkdir()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"checkpoint-1 could not be written: File too large.*ulimit -f"
        ):
            _save(tmp_path / "c", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "c").iterdir())
