"""Checkpoints that are damaged or foreign, recipes that have changed, and runs that start anew."""

import dataclasses
import hashlib
import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from accel_gpt2.classify.aside import is_trained, make_way, move_aside
from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.run import open_run
from accel_gpt2.cli.errors import outcome
from accel_gpt2.cli.run_directory import check_run_directory, prepare_run_directory
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import FIELDS, RUN_FIELDS, WARNED_FIELDS, TrainRecipe
from accel_gpt2.train import loop
from accel_gpt2.train.checkpoint import list_checkpoints, read_state

from .conftest import read_log, resolve_tiny
from .runs import assert_same_models, final_weights, train_and_stop, unfinished_copy


@pytest.fixture
def unfinished(trained_run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run whose first class has checkpoints 12 and 6 and no `final/`; and that class's folder."""
    return unfinished_copy(trained_run, tmp_path / "run")


def _flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _truncate(file: Path, num_bytes: int = -1) -> None:
    file.write_bytes(file.read_bytes()[:num_bytes])


def _empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def _take_manifest_of(other: Path) -> Callable[[Path], object]:
    return lambda directory: shutil.copy(other / "manifest.json", directory / "manifest.json")


_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda d: _truncate(d / "optimizer.pt"), "optimizer.pt has "),
    "flipped byte": (
        lambda d: _flip_a_byte(d / "model.safetensors"),
        "the content of model.safetensors has changed",
    ),
    "missing file": (
        lambda d: (d / "random-0.safetensors").unlink(),
        "random-0.safetensors is missing",
    ),
    "empty folder": (_empty, "it has no manifest.json"),
    "manifest cut": (
        lambda d: _truncate(d / "manifest.json", 99),
        "manifest.json cannot be rea",
    ),
    "manifest of zeros": (
        lambda d: (d / "manifest.json").write_bytes(bytes(300)),
        "manifest.json cannot be read",
    ),
    "link out": (
        lambda d: (
            (d / "state.json").replace(d.parent / "s") and (d / "state.json").symlink_to("../s")
        ),
        "state.json leads out of it",
    ),
}


@pytest.mark.parametrize("kind", _DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    unfinished: tuple[Path, Path],
    trained_run: Path,
    texts_file: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    """The one before it takes its place, the run ends as ever, and the damage is kept aside."""
    run, directory = unfinished
    newest, older = list_checkpoints(directory)
    damage, message = _DAMAGE[kind]
    damage(newest)
    fit(resolve_tiny(texts_file), run, quiet=True)
    said = capsys.readouterr().err
    assert any(
        line.startswith(f"Skipped: {newest}") and message in line for line in said.splitlines()
    ), said
    assert f"kitchen goes on from {older}" in said
    assert_same_models(run, trained_run)
    assert (directory / f"superseded-{newest.name}").is_dir()


def test_a_manifest_of_another_model(
    unfinished: tuple[Path, Path],
    trained_run: Path,
    texts_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its hashes are of other files, so it vouches for nothing."""
    run, directory = unfinished
    (other,) = trained_run.glob("class-1-*")
    newest = list_checkpoints(directory)[0]
    _take_manifest_of(other / "best")(newest)
    fit(resolve_tiny(texts_file), run, quiet=True)
    assert f"Skipped: {newest} is damaged: " in capsys.readouterr().err
    assert_same_models(run, trained_run)


def _snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder, by its path."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def _refused(run: Path, texts_file: Path, match: str, **changes: Any) -> str:
    """Starting the run is refused in one sentence or a few, and changes nothing of it."""
    before = {k: v for k, v in _snapshot(run).items() if k not in {"run.lock", "owner.json"}}
    with pytest.raises(UserError, match=match) as refused:
        fit(resolve_tiny(texts_file, **changes), run, quiet=True)
    after = {k: v for k, v in _snapshot(run).items() if k not in {"run.lock", "owner.json"}}
    assert after == before
    code, text = outcome(refused.value)
    assert code == refused.value.exit_code
    assert "\n" not in text
    return text


def test_when_nothing_is_whole_nothing_is_started(
    unfinished: tuple[Path, Path], trained_run: Path, texts_file: Path
) -> None:
    """Hours of training are not begun again in silence: every reason is said, and what to type."""
    run, directory = unfinished
    newest, older = list_checkpoints(directory)
    _truncate(newest / "model.safetensors")
    _empty(older)
    text = _refused(run, texts_file, f"Nothing in {directory} is whole")
    assert f"{newest} is damaged: model.safetensors has" in text
    assert f"{older} is not whole: it has no manifest.json" in text
    assert "--resume never to start anew" in text
    fit(resolve_tiny(texts_file), run, resume="never", quiet=True)
    assert_same_models(run, trained_run)
    assert len(list(run.glob("before-*/class-0-*/checkpoint-*"))) == 2


def test_a_good_copy_helps_where_nothing_is_whole(
    unfinished: tuple[Path, Path], trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """--resume PATH is taken before the damaged ones are looked at."""
    run, directory = unfinished
    newest, older = list_checkpoints(directory)
    shutil.copytree(older, tmp_path / "copy")
    for path in (newest, older):
        _truncate(path / "state.json")
    fit(resolve_tiny(texts_file), run, resume=str(tmp_path / "copy"), quiet=True)
    assert_same_models(run, trained_run)


def test_a_damaged_final_without_checkpoints_is_not_trained_anew(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """A model whose checkpoints were removed to save space is all that is left of its class."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    (directory,) = run.glob("class-0-*")
    for path in list_checkpoints(directory):
        shutil.rmtree(path)
    _flip_a_byte(directory / "final" / "model.safetensors")
    _refused(run, texts_file, r"final is damaged: the content of model\.safetensors has changed")


def test_a_damaged_final_is_exported_again(
    trained_run: Path, texts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its checkpoints, and the damage is said."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    (directory,) = run.glob("class-0-*")
    _truncate(directory / "final" / "model.safetensors")
    fit(resolve_tiny(texts_file), run, quiet=True)
    assert f"Skipped: {directory / 'final'} is damaged" in capsys.readouterr().err
    assert_same_models(run, trained_run)


def _forge(directory: Path, name: str) -> None:
    """Have the manifest agree with a file as it is now."""
    content = (directory / name).read_bytes()
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))


class _Malice:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.mkdir, (self.mark,))


@pytest.mark.parametrize("as_torch_saves", [True, False], ids=["torch", "pickle"])
def test_no_pickle_of_a_checkpoint_runs(
    unfinished: tuple[Path, Path], texts_file: Path, tmp_path: Path, as_torch_saves: bool
) -> None:
    """Code in optimizer.pt whose hash is right is refused, not passed over, and does not run."""
    run, directory = unfinished
    newest = list_checkpoints(directory)[0]
    malice = {"optimizer": _Malice(tmp_path / "unpickled"), "scaler": None}
    if as_torch_saves:
        torch.save(malice, newest / "optimizer.pt")
    else:
        (newest / "optimizer.pt").write_bytes(pickle.dumps(malice, protocol=2))
    _forge(newest, "optimizer.pt")
    _refused(run, texts_file, r"optimizer\.pt cannot be read as tensors and plain values")
    assert not (tmp_path / "unpickled").exists()
    pickle.loads(pickle.dumps(malice))  # as an unwary reader would have
    assert (tmp_path / "unpickled").is_dir()


def _other_shapes(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name][:-1].clone()}, directory / "model.safetensors")
    _forge(directory, "model.safetensors")


def _other_names(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    first = sorted(tensors)[0]
    renamed = {f"{name}.x" if name == first else name: x for name, x in tensors.items()}
    save_file(renamed, directory / "model.safetensors")
    _forge(directory, "model.safetensors")


def _no_state(directory: Path) -> None:
    (directory / "state.json").write_text("{}")
    _forge(directory, "state.json")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_other_shapes, r"optimizer\.pt is not the state of an optimizer of the 28 tensors"),
        (_other_names, r"is not of this model: .* is missing (t)?here"),
        (_no_state, r"state\.json cannot be read: state: Field required"),
    ],
    ids=["shapes", "names", "state"],
)
def test_what_agrees_with_its_manifest_and_is_no_checkpoint_of_ours(
    unfinished: tuple[Path, Path], texts_file: Path, change: Callable[[Path], None], match: str
) -> None:
    """Nobody's accident: it is refused with its name, and an older one is not taken instead."""
    run, directory = unfinished
    change(list_checkpoints(directory)[0])
    with pytest.raises(UserError, match=match):
        fit(resolve_tiny(texts_file), run, quiet=True)


def test_checkpoints_of_something_else(
    unfinished: tuple[Path, Path], trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """Of another class, another recipe, other data, another step: copied in, each is refused."""
    run, directory = unfinished
    newest, older = list_checkpoints(directory)
    (other,) = trained_run.glob("class-1-*/checkpoint-12")
    keep = tmp_path / "keep"
    newest.replace(keep)

    shutil.copytree(other, newest)
    _refused(run, texts_file, "it is of class 'orbit', not 'kitchen'")
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    _refused(run, texts_file, "checkpoint-12 holds step 6: it was renamed or copied")

    for key, value, match in (
        ("data_fingerprint", "x", "the training text has changed since"),
        ("tokenizer_fingerprint", "x", "the tokenizer has changed since"),
        ("recipe", {"seed": 3}, "seed was 3 and is 0"),
        ("recipe", {"model": "gpt2"}, "model was 'gpt2' and is 'gpt2-tiny'"),
        ("recipe", {"learning_rate": "fast", "max_steps": 7}, "max_steps was 7 and is None"),
        ("class_index", "0", "identity.class_index: .*valid integer"),
    ):
        shutil.rmtree(newest)
        shutil.copytree(keep, newest)
        content = json.loads((newest / "state.json").read_text())
        content["identity"][key] = value
        (newest / "state.json").write_text(json.dumps(content))
        _forge(newest, "state.json")
        _refused(run, texts_file, match)


# -- What may change ------------------------------------------------------------------------------

_OTHER: dict[str, Any] = {
    "model": "gpt2-mini",
    "init": "pretrained",
    "tokenizer": "x",
    "tokenizer_vocab_size": 301,
    "fused_gelu": False,
    "dataset": "x.csv",
    "text_field": "x",
    "label_field": "x",
    "class_names": ("x", "y"),
    "train_split": "x",
    "test_split": "x",
    "priors": "uniform",
    "finetuning": "lora",
    "lora_target_modules": ("c_attn",),
    "optimizer": "adafactor",
    "objective": "classification",
    "lr_schedule": "linear",
    "mixed_precision": "bf16",
    "bf16_rounding": "kahan",
    "tf32": False,
    "packing": "on",
    "compile": "on",
    "profile": "cpu",
    "placement": "sequential",
    "gradient_checkpointing": True,
    "use_dora": True,
    "quantization": "int8",
    "checkpointed_layers": 1,
    "release_gradients": True,
    "trackers": ("tensorboard",),
    "train_documents_per_class": 9,
    "max_steps": 9,
    "evaluate_every_steps": 2,
    "checkpoint_every_steps": 2,
    "max_time_seconds": 9.0,
    "price_usd_per_hour": 1.0,
    "budget_usd": 1.0,
    "global_batch_tokens": 9,
}


def _changed(recipe: TrainRecipe, key: str) -> TrainRecipe:
    old = getattr(recipe, key)
    value = _OTHER[key] if key in _OTHER else old + (1 if isinstance(old, int) else 0.125)
    assert value != old
    return dataclasses.replace(recipe, **{key: value})


@pytest.mark.parametrize("key", FIELDS)
def test_what_may_change_on_the_way(
    unfinished: tuple[Path, Path], texts_file: Path, key: str
) -> None:
    """The command line and the training ask the same sets; what is in neither is refused."""
    from accel_gpt2.classify.standing import _changes

    run, directory = unfinished
    shutil.rmtree(next(run.glob("class-1-*/final")))  # two of three are under way
    recipe = resolve_tiny(texts_file).recipe
    other = _changed(recipe, key)
    identity = read_state(list_checkpoints(directory)[0])[1]
    if key in RUN_FIELDS | WARNED_FIELDS:
        check_run_directory(run, other, resume="auto")
        changes = _changes(identity, identity, other, run)
        assert set(changes) == {key} - RUN_FIELDS
    else:
        with pytest.raises(UsageError, match=f"{key}: .* there, .* here"):
            check_run_directory(run, other, resume="auto")
        with pytest.raises(UserError, match=f"{key} was .* and is "):
            _changes(identity, identity, other, run)


def test_the_sets_of_keys() -> None:
    """What a run is never changes; the two sets that may change have nothing in common."""
    assert not RUN_FIELDS & WARNED_FIELDS
    assert set(FIELDS) > RUN_FIELDS | WARNED_FIELDS
    never = {"model", "tokenizer", "dataset", "seed", "epochs", "max_steps", "optimizer"}
    never |= {"global_batch_tokens", "global_batch_size", "finetuning", "max_length", "init"}
    assert not never & (RUN_FIELDS | WARNED_FIELDS)


def test_another_learning_rate_is_used_and_said(
    trained_run: Path, texts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the step of the checkpoint on; classes that had ended with the old one are named."""
    run = tmp_path / "run"
    train_and_stop(resolve_tiny(texts_file), run, 20)
    steps = {path.parent.name: path.name for path in run.glob("class-*/checkpoint-*")}
    stopped = steps["class-1-orbit"]
    capsys.readouterr()
    resolved = resolve_tiny(texts_file, learning_rate=1e-3)
    prepare_run_directory(run, resolved.recipe, resume="auto")
    fit(resolved, run, quiet=True)
    warnings = [x for x in capsys.readouterr().err.splitlines() if x.startswith("Warning: ")]
    assert warnings == [
        "Warning: kitchen was trained to the end with learning_rate = 0.002, and what is trained "
        "from now on has learning_rate = 0.001: the classes are not trained alike. --resume never "
        "trains all of them anew.",
        f"Warning: orbit was trained with learning_rate = 0.002 up to step {stopped[11:]}, and "
        "goes on with learning_rate = 0.001.",
    ]
    rates = {
        (row["class_name"], row["step"]): row["learning_rate"]
        for row in read_log(run)
        if row["event"] == "step"
    }
    whole = {
        (row["class_name"], row["step"]): row["learning_rate"]
        for row in read_log(trained_run)
        if row["event"] == "step"
    }
    at = int(stopped[11:])
    for (name, step), rate in rates.items():
        old = name == "kitchen" or (name == "orbit" and step <= at)
        assert rate == pytest.approx(whole[name, step] * (1 if old else 0.5)), (name, step)
    assert len(rates) == 36
    assert open_run(run).recipe.learning_rate == 1e-3


@pytest.mark.parametrize(
    "change",
    [{"weight_decay": 0.5}, {"adam_beta1": 0.5}, {"max_grad_norm": 0.01}, {"dropout": 0.5}],
    ids=lambda change: next(iter(change)),
)
def test_a_change_on_the_way_has_an_effect(
    trained_run: Path, texts_file: Path, tmp_path: Path, change: dict[str, float]
) -> None:
    """An optimizer's saved options do not stand over the recipe's."""
    run = tmp_path / "run"
    train_and_stop(resolve_tiny(texts_file), run, 3)
    fit(resolve_tiny(texts_file, **change), run, quiet=True)
    first, other = final_weights(run)[0], final_weights(trained_run)[0]
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_a_finished_run_has_nothing_to_change(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """A learning rate that would change nothing is refused, here and on the command line."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    assert is_trained(run)
    other = resolve_tiny(texts_file, learning_rate=0.1)
    _refused(run, texts_file, "trained to the end with learning_rate = 0.002", learning_rate=0.1)
    with pytest.raises(UsageError, match=r"learning_rate: 0\.002 there, 0\.1 here"):
        check_run_directory(run, other.recipe, resume="auto")
    check_run_directory(run, other.recipe, resume="never")
    shutil.rmtree(next(run.glob("class-2-*/final")))
    assert not is_trained(run)


# -- Starting anew --------------------------------------------------------------------------------


def test_the_command_line_keeps_the_whole_earlier_run(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """Before recipe.yaml is written, all of the old run is moved, and it opens as it did."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    (run / "evaluation").mkdir()
    (run / "notes.txt").write_text("mine")
    before = _snapshot(run)
    recipe = resolve_tiny(texts_file, learning_rate=1e-3, max_steps=1).recipe
    prepare_run_directory(run, recipe, resume="never")
    (old,) = run.glob("before-*")
    kept = {key: x for key, x in before.items() if key not in {"run.lock", "owner.json"}}
    assert _snapshot(old) == kept
    assert open_run(old) == dataclasses.replace(open_run(trained_run), directory=old)
    assert {path.name for path in run.iterdir()} - {"run.lock"} == {old.name, "recipe.yaml"}
    # The launched process is given --resume=never too, and finds nothing to move.
    prepare_run_directory(run, recipe, resume="never")
    fit(resolve_tiny(texts_file, learning_rate=1e-3, max_steps=1), run, resume="never", quiet=True)
    assert list(run.glob("before-*")) == [old]
    assert _snapshot(old) == kept


def test_two_runs_set_aside_in_the_same_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a folder of its own; none is written over."""
    monkeypatch.setattr(time, "strftime", lambda form: "before-2026-11-23-120000")
    for number in range(3):
        (tmp_path / "recipe.yaml").write_text(f"seed: {number}\n")
        (tmp_path / "log.jsonl").write_text(f"{number}\n")
        make_way(tmp_path, resume="never")
    folders = sorted(tmp_path.glob("before-*"))
    assert [folder.name for folder in folders] == [
        "before-2026-11-23-120000",
        "before-2026-11-23-120000-2",
        "before-2026-11-23-120000-3",
    ]
    assert [(folder / "log.jsonl").read_text() for folder in folders] == ["0\n", "1\n", "2\n"]
    assert move_aside(tmp_path) is None, "there is no run any more"


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_move_that_was_cut_off_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    """Killed after any of its renames, the old run is whole after the next start."""
    names = ["calibration.json", "class-0-a", "class-1-b", "log.jsonl", "plan.json"]
    replace = Path.replace

    class Killed(BaseException):
        pass

    cut = 0
    for survivors in range(10):
        run = tmp_path / str(survivors)
        for name in names:
            (run / name).mkdir(parents=True)
        (run / "recipe.yaml").write_text("seed: 1\n")
        renames = 0

        def rename(self: Path, target: Path) -> Path:
            nonlocal renames
            if renames == survivors:  # noqa: B023
                raise Killed
            renames += 1
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", rename)
            try:
                make_way(run, resume="never")
            except Killed:
                cut += 1
        assert (run / "recipe.yaml").is_file(), "or the folder would be nobody's"
        make_way(run, resume=resume)
        (old,) = run.glob("before-*")
        assert sorted(path.name for path in old.iterdir()) == [*names, "recipe.yaml"]
        assert sorted(path.name for path in run.iterdir()) == [old.name, "recipe.yaml"]
    assert cut == len(names) + 1


# -- What is said and counted beforehand ----------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adamw_8bit", "epochs": 2.5},
        {"optimizer": "adafactor", "evaluate_every_steps": 5, "keep_checkpoints": 1},
        {"max_steps": 8, "checkpoint_every_steps": 3},
    ],
    ids=["epochs", "8-bit", "adafactor", "max_steps"],
)
def test_the_plan_knows_what_a_run_writes_and_keeps(
    texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """plan.json against the bytes that the run really wrote, and left, to 5%."""
    sizes: list[int] = []
    save = loop.save_checkpoint

    def counting(*args: Any, **options: Any) -> Path:
        saved = save(*args, **options)
        sizes.append(_size(saved))
        return saved

    monkeypatch.setattr(loop, "save_checkpoint", counting)
    run = tmp_path / "run"
    fit(resolve_tiny(texts_file, **changes), run, quiet=True)
    plan = json.loads((run / "plan.json").read_text())
    finals = sum(_size(path) for path in run.glob("class-*/final"))
    kept = sum(_size(path) for path in run.glob("class-*/checkpoint-*"))
    assert plan["checkpoint_bytes"] == pytest.approx(max(sizes), rel=0.05)
    assert plan["written_bytes"] == pytest.approx(sum(sizes) + finals, rel=0.05)
    assert kept + finals <= 1.05 * plan["kept_bytes"]
    assert plan["kept_bytes"] <= plan["written_bytes"]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
