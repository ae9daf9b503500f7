"""Checkpoints are whole or not there."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from accel_gpt2.catalog.optimizers import OPTIMIZERS
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train import checkpoint as checkpoint_module
from accel_gpt2.train.checkpoint import (
    Identity,
    TrainState,
    checkpoint_bytes,
    inspect_checkpoint,
    list_checkpoints,
    mend_best,
    newest_checkpoint,
    point_best_at,
    read_checkpoint,
    read_state,
    rotate,
    save_checkpoint,
    set_aside_newer,
)
from accel_gpt2.train.manifest import publish_directory, verify
from accel_gpt2.train.optim import build_optimizer

IDENTITY = Identity(
    class_index=0, class_name="a", data_fingerprint="d", tokenizer_fingerprint="t", recipe={}
)


def _save(folder: Path, step: int) -> Path:
    weight = torch.nn.Parameter(torch.full((4, 3), float(step)))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return save_checkpoint(
        folder,
        state=TrainState(step=step, total_steps=100, tokens=10 * step),
        identity=IDENTITY,
        weights={"w": weight.detach()},
        optimizer={"optimizer": optimizer.state_dict(), "scaler": None},
        random_states=[{"cpu": torch.get_rng_state()}],
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """State, weights, optimizer and random state come back as they were."""
    directory = _save(tmp_path / "c", 7)
    checkpoint = read_checkpoint(directory)
    assert checkpoint.state == TrainState(step=7, total_steps=100, tokens=70)
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


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o027], ids=oct)
def test_files_have_the_modes_of_the_umask(tmp_path: Path, umask: int) -> None:
    """Nothing is closed to a group that the umask lets in, and nothing opened to others."""
    before = os.umask(umask)
    try:
        directory = _save(tmp_path / "c", 1)
        point_best_at(directory)
    finally:
        os.umask(before)
    files = list(directory.iterdir())
    assert len(files) == 5
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in (directory, directory.parent)} == {
        0o777 & ~umask
    }


@pytest.mark.parametrize("num_processes", [1, 4])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_room_that_a_checkpoint_needs(tmp_path: Path, name: Any, num_processes: int) -> None:
    """Weights, optimizer and random states are counted: never too little, and hardly too much."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64 + i % 2, 65 - i % 2) for i in range(20)))
    optimizer = build_optimizer(model, TrainRecipe(optimizer=name))
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    content: dict[str, Any] = {
        "weights": {name: parameter.detach() for name, parameter in model.named_parameters()},
        "optimizer": {"optimizer": optimizer.state_dict(), "scaler": None},
        "random_states": [{"cpu": torch.get_rng_state()}] * num_processes,
    }
    directory = save_checkpoint(tmp_path, state=TrainState(), identity=IDENTITY, **content)
    files = list(directory.iterdir())
    predicted = checkpoint_bytes(*content.values()) + (directory / "state.json").stat().st_size
    real = sum(file.stat().st_size for file in files)
    on_the_disk = sum(file.stat().st_blocks * 512 for file in files)
    assert max(real, on_the_disk) <= predicted <= real + max(0.05 * real, 2**16)


def _record_flushes(monkeypatch: pytest.MonkeyPatch, events: list[tuple[str, str]]) -> None:
    fsync, replace = os.fsync, Path.replace

    def flush(descriptor: int) -> None:
        events.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append(("rename", str(target)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", rename)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to name a descriptor")
def test_everything_is_on_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a power loss: files, then their folders, then the rename, then the folder above."""

    def write(staging: Path) -> None:
        (staging / "deep" / "deeper").mkdir(parents=True)
        (staging / "deep" / "deeper" / "file").write_text("x")
        (staging / "file").write_text("y")

    events: list[tuple[str, str]] = []
    _record_flushes(monkeypatch, events)
    target = tmp_path / "new" / "final"
    publish_directory(target, write)
    staging = target.with_name(".staging-final")
    renamed = events.index(("rename", str(target)))
    flushed = [path for event, path in events[:renamed] if event == "flush"]
    for path in ("deep/deeper/file", "file", "deep/deeper", "deep"):
        assert str(staging / path) in flushed
    assert flushed[-1] == str(staging), "after the manifest's own rename"
    assert flushed.index(str(staging / "deep/deeper/file")) < flushed.index(
        str(staging / "deep/deeper")
    )
    assert str(tmp_path) in flushed, "a folder that was made has its name in the one above"
    assert events[renamed + 1 :] == [("flush", str(target.parent))]


def _failing(monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> Callable[[], list[str]]:
    """Have the `number`-th call that touches the disk fail; returns what was called."""
    calls: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                raise OSError(code, os.strerror(code))
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)

    wrap(os, "fsync")
    for name in ("open", "replace", "mkdir", "chmod", "touch", "unlink", "symlink_to"):
        wrap(Path, name)
    wrap(checkpoint_module, "save_file")
    wrap(torch, "save")
    return lambda: calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_any_call_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Whichever call of a save fails: one sentence, a whole checkpoint, and the next try works."""
    assert code is not None
    for number in range(1, 1000):
        folder = tmp_path / str(number)
        _save(folder, 1)
        point_best_at(folder / "checkpoint-1")
        with monkeypatch.context() as patch:
            calls = _failing(patch, number, code)
            try:
                point_best_at(_save(folder, 2))
                rotate(folder, keep=1, best_step=2)
                failed = False
            except UserError as error:
                assert os.strerror(code) in str(error)  # noqa: PT017
                failed = True
        if len(calls()) < number:
            break
        whole = list_checkpoints(folder)
        assert whole, (number, calls())
        for directory in [*whole, folder / "best"]:
            verify(directory)
        assert failed, calls()
        point_best_at(_save(folder, 3))
        rotate(folder, keep=1, best_step=3)
        assert [path.name for path in folder.iterdir() if path.name != "best"] == ["checkpoint-3"]
    assert 30 < number < 999, "a save makes that many calls"


def test_a_replacement_that_fails_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same step saved again: when the second rename fails, the first is taken back."""
    saved = _save(tmp_path / "c", 3)
    replace = Path.replace

    def rename(self: Path, target: Path) -> Path:
        if self.name == ".staging-checkpoint-3":
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", rename)
        with pytest.raises(UserError, match="checkpoint-3 could not be written: Input/output"):
            _save(tmp_path / "c", 3)
    verify(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint-3"]


def test_rotation_brings_a_cut_off_replacement_back_first(tmp_path: Path) -> None:
    """What was moved aside for its successor is a good checkpoint, and no leftover."""
    folder = tmp_path / "c"
    saved = _save(folder, 3)
    saved.replace(folder / ".staging-replaced-checkpoint-3")
    _save(folder, 4)
    rotate(folder, keep=2, best_step=-1)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-4", "checkpoint-3"]


def test_a_link_that_was_cut_off_is_removed_as_a_link(tmp_path: Path) -> None:
    """Killed before `best` was replaced: the link goes, the checkpoint that it leads to stays."""
    folder = tmp_path / "c"
    saved = _save(folder, 1)
    (folder / ".staging-best").symlink_to(saved.name)
    rotate(folder, keep=1, best_step=-1)
    verify(saved)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]


def test_nothing_that_was_set_aside_is_lost(tmp_path: Path) -> None:
    """Going back twice keeps both futures, and `best` leads nowhere in between."""
    folder = tmp_path / "c"
    _save(folder, 1)
    for _ in range(2):
        point_best_at(_save(folder, 2))
        set_aside_newer(folder, 1)
        assert not (folder / "best").is_symlink()
    for name in ("superseded-checkpoint-2", "superseded-checkpoint-2-2"):
        verify(folder / name)
    mend_best(folder, 1)
    assert (folder / "best").resolve().name == "checkpoint-1"
    mend_best(folder, 7)
    assert not (folder / "best").is_symlink()


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taking it for empty would start the class anew."""
    _save(tmp_path / "c", 1)

    def fails(path: object) -> list[str]:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "listdir", fails)
    with pytest.raises(UserError, match="c cannot be read: Input/output error"):
        newest_checkpoint(tmp_path / "c")


def forge(directory: Path, name: str, write: Callable[[Path], object]) -> None:
    """Change a file of a checkpoint and have the manifest agree."""
    file = directory / name
    write(file)
    manifest = json.loads((directory / "manifest.json").read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": digest}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def _change_state(**changes: object) -> Callable[[Path], object]:
    def write(file: Path) -> None:
        content = json.loads(file.read_text())
        content["state"].update(changes)
        file.write_text(json.dumps(content))

    return write


def _optimizer(content: object) -> Callable[[Path], object]:
    return lambda file: torch.save(content, file)


def _adamw(*shapes: tuple[int, ...]) -> dict[str, Any]:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


class _Malice:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (os.mkdir, ("unpickled",))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("state.json", lambda f: f.write_text("[]"), "state.json cannot be read: .*an object"),
        ("state.json", lambda f: f.write_text("{}"), "state.json cannot be read: state: Field req"),
        ("state.json", _change_state(step="8"), "state.step: .*valid integer"),
        ("state.json", _change_state(batch=-1), "state.batch: .*greater than or equal to 0"),
        ("state.json", _change_state(speed=1), "state.speed: Unexpected keyword argument"),
        ("state.json", _change_state(step=9), "holds step 9: it was renamed or copied"),
        ("state.json", _change_state(total_steps=7), "it is at step 8 of 7"),
        ("state.json", lambda f: f.write_text("[" * 100_000), "state.json cannot be read: Invalid"),
        (
            "model.safetensors",
            lambda f: f.write_bytes(b"x" * 64),
            "model.safetensors cannot be rea",
        ),
        ("model.safetensors", lambda f: save_file({}, f), "not the state of an optimizer of the 0"),
        (
            "random-0.safetensors",
            lambda f: save_file({"cuda": torch.zeros(2)}, f),
            "random numbers",
        ),
        ("random-0.safetensors", lambda f: save_file({"cpu": torch.zeros(2)}, f), "random numbers"),
        ("optimizer.pt", lambda f: f.write_bytes(pickle.dumps(_Malice())), "nothing else is taken"),
        ("optimizer.pt", _optimizer({"x": _Malice()}), r"optimizer.pt cannot .*UnpicklingError"),
        ("optimizer.pt", lambda f: f.write_bytes(b"PK"), "cannot be read as tensors"),
        ("optimizer.pt", _optimizer([1, 2]), "not the state of an optimizer of the 1 tensors"),
        ("optimizer.pt", _optimizer({"optimizer": {}}), "not the state of an optimizer"),
        (
            "optimizer.pt",
            _optimizer({"optimizer": _adamw((4, 3), (3,)), "scaler": None}),
            "not the state of an optimizer",
        ),
        (
            "optimizer.pt",
            _optimizer({"optimizer": _adamw((3, 4)), "scaler": None}),
            "not the state of an optimizer",
        ),
    ],
)
def test_what_a_whole_checkpoint_may_not_hold(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Path], object],
    message: str,
) -> None:
    """Files that agree with their manifest are read strictly all the same; no pickle runs."""
    monkeypatch.chdir(tmp_path)
    directory = _save(tmp_path / "c", 8)
    inspect_checkpoint(directory)
    forge(directory, name, write)
    verify(directory)
    for read in (inspect_checkpoint, read_checkpoint):
        with pytest.raises(UserError, match=message) as refused:
            read(directory)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "unpickled").exists()


def test_only_what_the_manifest_lists_is_read(tmp_path: Path) -> None:
    """A random state that was put beside the others is nobody's; one that is missing is missed."""
    directory = _save(tmp_path / "c", 1)
    shutil.copy(directory / "random-0.safetensors", directory / "random-1.safetensors")
    (directory / "random-x.safetensors").write_text("x")
    assert len(read_checkpoint(directory).random_states) == 1
    manifest = json.loads((directory / "manifest.json").read_text())
    for name in ("optimizer.pt", "state.json", "model.safetensors", "random-0.safetensors"):
        fewer = {key: value for key, value in manifest["files"].items() if key != name}
        (directory / "manifest.json").write_text(json.dumps({**manifest, "files": fewer}))
        verify(directory)
        with pytest.raises(UserError, match=f"is not a checkpoint: it has no {name}"):
            inspect_checkpoint(directory)


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "..", ".", "", "a/../../b", "nul\0", "x" * 5000]
)
def test_odd_names_in_a_manifest(tmp_path: Path, name: str) -> None:
    """No name makes us read outside the checkpoint, or end in anything but a sentence."""
    directory = _save(tmp_path / "c", 1)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"is damaged: .*(leads out|missing|cannot be read)"):
        verify(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_link_out_of_a_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    """Also when what it leads to has the right content."""
    directory = _save(tmp_path / "c", 1)
    outside = tmp_path / name
    (directory / name).replace(outside)
    (directory / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{name} leads out of it|it has no {name}"):
        verify(directory)


def test_checkpoints_on_a_larger_disk(tmp_path: Path) -> None:
    """A class's folder, and a checkpoint, may be links to elsewhere; rotation removes the link."""
    (tmp_path / "large").mkdir()
    folder = tmp_path / "c"
    folder.symlink_to("large")
    moved = _save(folder, 1).rename(tmp_path / "moved")
    (folder / "checkpoint-1").symlink_to(moved)
    assert newest_checkpoint(folder) == (folder / "checkpoint-1", [])
    _save(folder, 2)
    rotate(folder, keep=1, best_step=-1)
    assert list_checkpoints(folder) == [folder / "checkpoint-2"]
    verify(moved)


def test_names_that_are_no_checkpoints(tmp_path: Path) -> None:
    """Only `checkpoint-<step>` as it is written counts; one step has one name."""
    folder = tmp_path / "c"
    _save(folder, 7)
    for name in ("checkpoint-007", "checkpoint-٧", "checkpoint--1", "checkpoint-7b", "checkpoint-"):
        (folder / name).mkdir()
    (folder / "checkpoint-9").write_text("a file")
    assert list_checkpoints(folder) == [folder / "checkpoint-7"]
