"""Going on: from any stop, from a chosen checkpoint, past damage; and what a start leaves alone."""

import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from accel_gpt2.classify import part_training, standing
from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.run import open_run
from accel_gpt2.errors import StoppedEarly, UsageError, UserError
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.checkpoint import (
    list_checkpoints,
    read_checkpoint,
    read_state,
    read_weights,
    save_checkpoint,
)
from accel_gpt2.train.manifest import verify

from .conftest import read_log, resolve_tiny
from .runs import assert_same_models, stop_at_question, train_and_stop, unfinished_copy


def _rows(run: Path, event: str, *keys: str) -> list[tuple[Any, ...]]:
    """The last row of each class and step, reduced to some keys, in order."""
    rows = {
        (row["class_index"], row["step"]): tuple(row[key] for key in keys)
        for row in read_log(run)
        if row["event"] == event
    }
    return [(*place, *values) for place, values in sorted(rows.items())]


@pytest.mark.parametrize("number", [3, 7, 14, 22], ids=str)
def test_stopped_anywhere_and_resumed_is_the_same(
    trained_run: Path, texts_file: Path, tmp_path: Path, number: int
) -> None:
    """Between steps, within an evaluation, at an epoch's end: tensors and losses are equal."""
    run = tmp_path / "run"
    resolved = resolve_tiny(texts_file)
    train_and_stop(resolved, run, number)
    fit(resolved, run, quiet=True)
    assert_same_models(run, trained_run)
    keys = ("loss", "epoch", "tokens", "learning_rate", "grad_norm")
    assert _rows(run, "step", *keys) == _rows(trained_run, "step", *keys)
    keys = ("validation_bits_per_token", "best", "joint_validation_accuracy")
    assert _rows(run, "evaluate", *keys) == _rows(trained_run, "evaluate", *keys)


@pytest.mark.parametrize("micro_batch_tokens", [4096, 32], ids=["at-once", "accumulated"])
@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_every_way_of_training_resumes_exactly(
    trained_run: Path, texts_file: Path, tmp_path: Path, finetuning: str, micro_batch_tokens: int
) -> None:
    """Full and LoRA, with and without accumulation, stopped within an epoch and after its end."""
    changes: dict[str, Any] = {"micro_batch_tokens": micro_batch_tokens, "max_steps": 8}
    if finetuning == "lora":
        base = str(next(trained_run.glob("class-0-*/final")))
        changes |= {"model": base, "init": "pretrained", "tokenizer": "auto"}
        changes |= {"finetuning": "lora", "lora_dropout": 0.1}
    resolved = resolve_tiny(texts_file, **changes)
    fit(resolved, tmp_path / "whole", quiet=True)
    stopped_at = []
    for number in (4, 5):  # after 3 steps, then after 4 more, over the end of the epoch of 6
        train_and_stop(resolved, tmp_path / "run", number)
        newest = list_checkpoints(next((tmp_path / "run").glob("class-0-*")))[0]
        stopped_at.append(read_state(newest)[0].step)
    assert stopped_at[0] < 6 <= stopped_at[1]
    fit(resolved, tmp_path / "run", quiet=True)
    assert_same_models(tmp_path / "run", tmp_path / "whole")
    keys = ("loss", "epoch", "tokens", "grad_norm")
    assert _rows(tmp_path / "run", "step", *keys) == _rows(tmp_path / "whole", "step", *keys)


def test_a_stop_between_log_lines_changes_no_logged_loss(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """A line's loss is the mean over its tokens, also of the steps before the stop."""
    resolved = resolve_tiny(texts_file, log_every_steps=5)
    train_and_stop(resolved, tmp_path / "run", 4)
    fit(resolved, tmp_path / "run", quiet=True)
    single = _rows(trained_run, "step", "loss", "tokens")[:5]
    loss = np.array([row[2] for row in single])
    tokens = np.diff([0, *(row[3] for row in single)])
    first = _rows(tmp_path / "run", "step", "loss")[0]
    assert first == (0, 5, pytest.approx((loss * tokens).sum() / tokens.sum(), rel=1e-6))


def test_a_missing_final_is_exported_again(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """All steps done but no final/, and a stale `best`: the export is that of the best step."""
    run, directory = unfinished_copy(trained_run, tmp_path / "run")
    best = (directory / "best").resolve()
    (directory / "best").unlink()
    (directory / "best").symlink_to("checkpoint-6" if best.name != "checkpoint-6" else "nowhere")
    fit(resolve_tiny(texts_file), run, quiet=True)
    assert_same_models(run, trained_run)


def test_a_damaged_best_checkpoint_is_chosen_anew(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """When the best checkpoint is damaged, the next evaluation that is whole takes its place."""
    run, directory = unfinished_copy(trained_run, tmp_path / "run")
    newest, older = list_checkpoints(directory)
    assert (directory / "best").resolve() == newest.resolve()
    (newest / "model.safetensors").write_bytes(b"")
    (directory / "best").unlink()
    fit(resolve_tiny(texts_file), run, quiet=True)
    verify(directory / "best")
    assert_same_models(run, trained_run)  # the same step again, from the checkpoint before
    assert (directory / f"superseded-{newest.name}").is_dir()
    assert older in list_checkpoints(directory)


def _call_best(directory: Path, newest: Path, step: int) -> None:
    """Have the newest checkpoint say that the best evaluation was that of an earlier step."""
    whole = read_checkpoint(newest)
    whole.state.best_step, whole.state.best_loss_bits = step, 0.1
    save_checkpoint(
        directory, **{x.name: getattr(whole, x.name) for x in dataclasses.fields(whole)}
    )


def test_final_is_the_best_step_not_the_last(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """What a run ends with is the model of its best evaluation."""
    run, directory = unfinished_copy(trained_run, tmp_path / "run")
    newest, older = list_checkpoints(directory)
    step = read_state(older)[0].step
    _call_best(directory, newest, step)
    fit(resolve_tiny(texts_file), run, quiet=True)
    expected = read_weights(older)
    exported = load_file(directory / "final" / "model.safetensors")
    assert exported
    assert all(torch.equal(tensor, expected[name]) for name, tensor in exported.items())
    assert json.loads((directory / "final" / "training.json").read_text())["best_step"] == step


def test_a_lost_best_checkpoint_is_forgotten(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """A best step whose checkpoint is gone cannot be exported; this step is evaluated again."""
    run, directory = unfinished_copy(trained_run, tmp_path / "run")
    newest, older = list_checkpoints(directory)
    _call_best(directory, newest, read_state(older)[0].step)
    (directory / "best").unlink()
    (directory / "best").symlink_to(older.name)
    shutil.rmtree(older)
    fit(resolve_tiny(texts_file), run, quiet=True)
    assert_same_models(run, trained_run)
    assert (directory / "best").resolve().name == newest.name


def test_resume_from_a_chosen_checkpoint(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """--resume PATH goes back to it; what is newer is set aside, also from later starts."""
    run, directory = unfinished_copy(trained_run, tmp_path / "run", class_index=1)
    newest, older = list_checkpoints(directory)
    resolved = resolve_tiny(texts_file, keep_checkpoints=1)
    with pytest.MonkeyPatch.context() as patch:
        stop_at_question(patch, 3)
        with pytest.raises(StoppedEarly, match="SIGTERM"):
            fit(resolved, run, resume=str(older), quiet=True)
    step = read_state(older)[0].step
    assert list_checkpoints(directory)[0].name == f"checkpoint-{step + 2}"
    assert (directory / f"superseded-{newest.name}").is_dir()
    fit(resolved, run, quiet=True)
    resumed = [r["step"] for r in read_log(run) if r["event"] == "resume" and r["class_index"] == 1]
    assert resumed == [step, step + 2]
    assert_same_models(run, trained_run)


def test_what_cannot_be_resumed_from_is_said(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """No directory, no checkpoint, another class's, and a class that is finished."""
    resolved = resolve_tiny(texts_file)
    (finished,) = trained_run.glob("class-0-*")
    with pytest.raises(UsageError, match="give auto, never, or a checkpoint directory"):
        fit(resolved, trained_run, resume=str(tmp_path / "nowhere"), quiet=True)
    with pytest.raises(UsageError, match="it is no checkpoint"):
        fit(resolved, trained_run, resume=str(finished / "final"), quiet=True)
    with pytest.raises(UsageError, match="kitchen is trained to the end already"):
        fit(resolved, trained_run, resume=str(finished / "best"), quiet=True)
    other = resolve_tiny(texts_file, seed=1)
    with pytest.raises(UserError, match=r"checkpoint-\d+ does not go on from here: .*seed was 0"):
        fit(other, tmp_path / "new", resume=str(finished / "best"), quiet=True)


def test_batches_of_another_version_are_not_gone_on_with(
    trained_run: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place in an epoch would mean other documents there."""
    (finished,) = trained_run.glob("class-0-*")
    monkeypatch.setattr(standing, "BATCHES_VERSION", standing.BATCHES_VERSION + 1)
    with pytest.raises(UserError, match=r"another version of accel-gpt2 made its batches"):
        fit(resolve_tiny(texts_file), tmp_path / "new", resume=str(finished / "best"), quiet=True)


def test_resume_never_starts_anew_and_keeps_the_old(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """Earlier results move aside whole; the new run's log and trackers are its own."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    resolved = resolve_tiny(texts_file, learning_rate=1e-3, trackers=["tensorboard"], max_steps=2)
    fit(resolved, run, resume="never", quiet=True)
    (aside,) = run.glob("before-*")
    assert_same_models(aside, trained_run)
    assert (aside / "log.jsonl").read_text() == (trained_run / "log.jsonl").read_text()
    assert not (aside / "trackers").exists()
    assert list((run / "trackers").rglob("events.*"))
    assert max(row.get("step", 0) for row in read_log(run)) == 2
    assert open_run(run).recipe == resolved.recipe


def test_a_stopped_run_leaves_its_tracker_rows(texts_file: Path, tmp_path: Path) -> None:
    """TensorBoard has every step up to the stop, not only those that it happened to flush."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train_and_stop(resolve_tiny(texts_file, trackers=["tensorboard"]), run, 5)
    events = EventAccumulator(str(next((run / "trackers").rglob("events.*")).parent)).Reload()
    (tag,) = (tag for tag in events.Tags()["scalars"] if tag.endswith("/loss"))
    assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4]


def test_a_refused_start_writes_nothing(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """Another recipe is refused before the run's own recipe.yaml is touched."""
    run, directory = unfinished_copy(trained_run, tmp_path / "run")
    names = sorted(path.name for path in directory.iterdir())
    before = (run / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"optimizer was 'adamw' and is 'adafactor'"):
        fit(resolve_tiny(texts_file, optimizer="adafactor"), run, quiet=True)
    assert (run / "recipe.yaml").read_text() == before
    assert sorted(path.name for path in directory.iterdir()) == names


def test_changed_training_text_is_refused(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """Half a run on one text and half on another is no experiment."""
    run, _ = unfinished_copy(trained_run, tmp_path / "run")
    changed = tmp_path / "texts.csv"
    changed.write_text(texts_file.read_text() + "rocket moon probe,orbit\n")
    recipe = (run / "recipe.yaml").read_text().replace(str(texts_file), str(changed))
    (run / "recipe.yaml").write_text(recipe)
    with pytest.raises(UserError, match="the training text has changed since"):
        fit(resolve_tiny(changed), run, quiet=True)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adafactor"])
def test_every_optimizer_resumes_exactly(texts_file: Path, tmp_path: Path, optimizer: str) -> None:
    """Quantised and factored states come back as they were."""
    resolved = resolve_tiny(texts_file, optimizer=optimizer, max_steps=5)
    fit(resolved, tmp_path / "whole", quiet=True)
    train_and_stop(resolved, tmp_path / "halves", 4)
    fit(resolved, tmp_path / "halves", quiet=True)
    assert_same_models(tmp_path / "halves", tmp_path / "whole")


def test_a_class_is_gone_before_the_next_one_is_built(
    texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model at a time on the device, also with autocast, which ties a model to itself."""
    real = part_training.build_model
    built: list[weakref.ref[LanguageModel]] = []
    alive: list[int] = []

    def build(*args: Any, **options: Any) -> LanguageModel:
        alive.append(sum(reference() is not None for reference in built))
        model = real(*args, **options)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(part_training, "build_model", build)
    gc.disable()  # what is freed is freed by us
    try:
        resolved = resolve_tiny(texts_file, mixed_precision="bf16", max_steps=1)
        fit(resolved, tmp_path / "run", quiet=True)
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


def test_a_run_without_calibration_is_not_finished(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """A stop between the last class and the calibration is named, and a start makes up for it."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    expected = json.loads((run / "calibration.json").read_text())
    (run / "calibration.json").unlink()
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    rows = [line for line in lines if '"joint_validation"' in line]
    assert len(rows) == 2
    (run / "log.jsonl").write_text("".join(line for line in lines if line not in rows))
    with pytest.raises(UserError, match=r"calibration\.json is missing\. Go on with"):
        open_run(run)
    fit(resolve_tiny(texts_file), run, quiet=True)
    assert json.loads((run / "calibration.json").read_text()) == expected
    assert (run / "log.jsonl").read_text().endswith("".join(rows))
    fit(resolve_tiny(texts_file), run, quiet=True)
    assert (run / "log.jsonl").read_text().count('"joint_validation"') == 2
