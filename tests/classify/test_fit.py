"""Training end to end: the run directory, exact resume, accumulation, LoRA, signals, refusals."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.prepare import prepare_data
from accel_gpt2.classify.run import open_run
from accel_gpt2.data.batching import epoch_batches
from accel_gpt2.errors import ExitCode, StoppedEarly, UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train import loop
from accel_gpt2.train.casts import casts_kept
from accel_gpt2.train.checkpoint import list_checkpoints
from accel_gpt2.train.manifest import verify
from accel_gpt2.train.model import build_model

from .conftest import read_log, resolve_tiny
from .runs import ROUNDING_STAYS_SMALL, assert_close_models, final_weights, losses


def _send_at_step(log: Path, step: int, number: int, *, class_index: int) -> threading.Thread:
    """A signal to this process once the log shows that a class has reached a step."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            rows = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
            if any(r.get("class_index") == class_index and r["step"] >= step for r in rows):
                os.kill(os.getpid(), number)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_run_directory_is_as_described(trained_run: Path) -> None:
    """Everything DESIGN names is there, and every checkpoint and final verifies."""
    for name in (
        "recipe.yaml",
        "plan.json",
        "command.txt",
        "environment.json",
        "log.jsonl",
        "README.md",
        "calibration.json",
    ):
        assert (trained_run / name).is_file(), name
    run = open_run(trained_run)
    assert run.class_names == ("kitchen", "orbit", "river")
    assert [part.directory.name for part in run.parts] == [
        "class-0-kitchen",
        "class-1-orbit",
        "class-2-river",
    ]
    for folder in (part.directory for part in run.parts):
        checkpoints = list_checkpoints(folder)
        assert 1 <= len(checkpoints) <= run.recipe.keep_checkpoints + 1
        for directory in [*checkpoints, folder / "best", folder / "final"]:
            verify(directory)
        assert (folder / "best").is_symlink()


def test_losses_fall_and_the_best_checkpoint_is_the_one_with_least_bits(trained_run: Path) -> None:
    """Each class learns; `best` is the evaluation with the lowest validation bits per token."""
    rows = read_log(trained_run)
    for index in range(3):
        losses = [r["loss"] for r in rows if r["event"] == "step" and r["class_index"] == index]
        assert np.mean(losses[-3:]) < losses[0] - 0.5
        evaluations = [r for r in rows if r["event"] == "evaluate" and r["class_index"] == index]
        best = min(evaluations, key=lambda row: row["validation_bits_per_token"])
        (folder,) = trained_run.glob(f"class-{index}-*")
        assert (folder / "best").resolve().name == f"checkpoint-{best['step']}"
    alone = [r["joint_validation_accuracy"] for r in rows if r["event"] == "evaluate"]
    assert alone[0] is None  # no other class is trained yet
    assert alone[-1] is not None
    together = [(r["evaluation"], r["steps"]) for r in rows if r["event"] == "joint_validation"]
    assert together == [(1, [6, 6, 6]), (2, [12, 12, 12])]
    assert rows[-1]["accuracy"] == alone[-1]  # the last evaluation was each class's best


def test_final_loads_with_plain_transformers(trained_run: Path) -> None:
    """final/ is an ordinary transformers model with its tokenizer, head tied, nothing missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = next(trained_run.glob("class-0-*/final"))
    model, report = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.lm_head.weight is model.transformer.wte.weight
    tokenizer = AutoTokenizer.from_pretrained(final)
    ids = tokenizer("the old boat", return_tensors="pt").input_ids
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_a_second_start_trains_nothing(
    trained_run: Path, texts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is finished is not done again."""
    before = (trained_run / "log.jsonl").read_text()
    fit(resolve_tiny(texts_file), trained_run, quiet=True)
    assert (trained_run / "log.jsonl").read_text() == before
    assert capsys.readouterr().err.count("is trained already") == 3


def test_small_micro_batches_equal_one_large_one(texts_file: Path, tmp_path: Path) -> None:
    """Accumulating over micro batches trains the same model as the global batch at once, and so do
    packed rows."""
    changes: dict[str, dict[str, Any]] = {
        "large": {"micro_batch_tokens": 4096},
        "small": {"micro_batch_tokens": 24},
        "packed": {"micro_batch_tokens": 50, "packing": "on"},
    }
    for name, change in changes.items():
        fit(
            resolve_tiny(texts_file, **change, **ROUNDING_STAYS_SMALL),
            tmp_path / name,
            quiet=True,
        )
    large = np.array([x[2] for x in losses(tmp_path / "large")])
    for name in ("small", "packed"):
        assert_close_models(tmp_path / name, tmp_path / "large", rtol=1e-5)
        np.testing.assert_allclose([x[2] for x in losses(tmp_path / name)], large, rtol=1e-5)


def test_lora_on_a_pretrained_directory(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """LoRA trains adapters on a local model, resumes after a stop, and loads with plain peft."""
    from peft import AutoPeftModelForCausalLM

    base = next(trained_run.glob("class-0-*/final"))
    recipe = resolve_tiny(
        texts_file,
        model=str(base),
        init="pretrained",
        tokenizer="auto",
        finetuning="lora",
        learning_rate=1e-3,
        max_steps=4,
    )
    fit(recipe, tmp_path / "whole", quiet=True)
    run = tmp_path / "halves"
    _send_at_step(run / "log.jsonl", 2, signal.SIGTERM, class_index=1)
    with pytest.raises(StoppedEarly, match="SIGTERM"):
        fit(recipe, run, quiet=True)
    fit(recipe, run, quiet=True)
    assert_close_models(run, tmp_path / "whole", rtol=0)
    final = next(run.glob("class-1-*/final"))
    model = AutoPeftModelForCausalLM.from_pretrained(final)
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_bf16_autocast_learns_and_keeps_fp32_weights(texts_file: Path, tmp_path: Path) -> None:
    """Mixed precision computes in bf16 and leaves weights and optimizer states in fp32."""
    fit(
        resolve_tiny(texts_file, mixed_precision="bf16", max_steps=6, epochs=4.0),
        tmp_path / "run",
        quiet=True,
    )
    of_class = [loss for index, _, loss in losses(tmp_path / "run") if index == 0]
    assert of_class[-1] < of_class[0] - 0.3
    for weights in final_weights(tmp_path / "run"):
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_bf16_keeps_its_casts_within_a_step_alone(
    texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of several micro batches train the same bits as with copies of each one's own."""
    kept: list[int] = []

    def counting(recipe: TrainRecipe) -> contextlib.AbstractContextManager[None]:
        kept.append(1)
        return casts_kept(recipe)

    options: dict[str, Any] = {"mixed_precision": "bf16", "max_steps": 3, "micro_batch_tokens": 60}
    monkeypatch.setattr(loop, "casts_kept", counting)
    fit(resolve_tiny(texts_file, **options), tmp_path / "run", quiet=True)
    assert len(kept) == 9  # steps of three classes
    monkeypatch.setattr(loop, "casts_kept", lambda recipe: contextlib.nullcontext())
    fit(resolve_tiny(texts_file, **options), tmp_path / "other", quiet=True)
    assert_close_models(tmp_path / "run", tmp_path / "other", rtol=0)


def test_fp16_without_a_gpu_is_refused(texts_file: Path, tmp_path: Path) -> None:
    """fp16 needs a GPU's loss scaling; the message says what to give instead."""
    if torch.cuda.is_available():
        fit(resolve_tiny(texts_file, mixed_precision="fp16", max_steps=6), tmp_path, quiet=True)
        return
    with pytest.raises(UserError, match="give --mixed-precision no"):
        fit(resolve_tiny(texts_file, mixed_precision="fp16"), tmp_path / "run", quiet=True)


def test_trackers_get_every_row(texts_file: Path, tmp_path: Path) -> None:
    """TensorBoard's files hold the losses of each class; unknown trackers are refused by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    fit(resolve_tiny(texts_file, trackers=["tensorboard"], max_steps=3), run, quiet=True)
    (events,) = run.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    logged = [row for row in read_log(run) if row["event"] == "step" and row["class_index"] == 2]
    scalars = accumulator.Scalars("class-2-river/loss")
    assert [scalar.step for scalar in scalars] == [row["step"] for row in logged]
    assert [scalar.value for scalar in scalars] == pytest.approx([row["loss"] for row in logged])
    with pytest.raises(UserError, match="tracker 'tensorbord' is unknown"):
        fit(resolve_tiny(texts_file, trackers=["tensorbord"]), tmp_path / "other", quiet=True)


def test_time_limit_saves_and_says_so(texts_file: Path, tmp_path: Path) -> None:
    """--max-time ends with exit code 4 after saving; a longer limit goes on and finishes."""
    with pytest.raises(StoppedEarly, match=r"time limit of 0\.1 s") as stopped:
        fit(resolve_tiny(texts_file, max_time_seconds=0.1), tmp_path / "run", quiet=True)
    assert stopped.value.exit_code == ExitCode.LIMIT_REACHED
    fit(resolve_tiny(texts_file, max_time_seconds=600.0), tmp_path / "run", quiet=True)
    assert len(final_weights(tmp_path / "run")) == 3


def test_another_recipe_in_the_same_directory_is_refused(
    trained_run: Path, texts_file: Path
) -> None:
    """Going on with another optimizer would mix two experiments; the difference is named."""
    with pytest.raises(UserError, match="optimizer was 'adamw' and is 'adafactor'"):
        fit(resolve_tiny(texts_file, optimizer="adafactor"), trained_run, quiet=True)


def test_damaged_newest_checkpoint_falls_back(
    texts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint with a flipped byte is named and skipped; the one before it is used."""
    run = tmp_path / "run"
    recipe = resolve_tiny(texts_file, checkpoint_every_steps=2)
    _send_at_step(run / "log.jsonl", 5, signal.SIGTERM, class_index=0)
    with pytest.raises(StoppedEarly, match="SIGTERM"):
        fit(recipe, run, quiet=True)
    newest, before = list_checkpoints(next(run.glob("class-0-*")))[:2]
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    fit(recipe, run, quiet=True)
    talk = capsys.readouterr().err
    assert f"{newest} is damaged: the content of model.safetensors has changed" in talk
    assert f"goes on from {before}" in talk


@pytest.mark.parametrize("changes", [{"learning_rate": 1e30, "max_grad_norm": 0.0}])
def test_a_loss_that_is_not_finite_stops_the_run(
    texts_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Nothing is saved from numbers that went wrong, and the message says what to change."""
    with pytest.raises(UserError, match="smaller --learning-rate"):
        fit(resolve_tiny(texts_file, **changes), tmp_path / "run", quiet=True)
    assert not list((tmp_path / "run").glob("class-*/final"))


def test_a_model_without_gradients_is_refused(
    trained_run: Path, texts_file: Path, tmp_path: Path
) -> None:
    """All-zero weights give a finite loss and no gradient: hours of nothing, said at once."""
    from transformers import AutoModelForCausalLM

    base = tmp_path / "zero"
    shutil.copytree(next(trained_run.glob("class-0-*/final")), base)
    model = AutoModelForCausalLM.from_pretrained(base)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(base)
    resolved = resolve_tiny(texts_file, model=str(base), init="pretrained", tokenizer="auto")
    with pytest.raises(UserError, match="every gradient of the first step is zero"):
        fit(resolved, tmp_path / "run", quiet=True)


def test_training_is_that_of_a_plain_loop(texts_file: Path, tmp_path: Path) -> None:
    """transformers' loss, torch's clipping and AdamW, one document at a time: same numbers."""
    resolved = resolve_tiny(
        texts_file,
        dropout=0.0,
        fused_gelu=False,
        max_steps=5,
        max_grad_norm=0.5,
        lr_schedule="linear",
        warmup_fraction=0.4,
        min_learning_rate_fraction=0.0,
        micro_batch_tokens=32,
    )
    recipe = resolved.recipe
    fit(resolved, tmp_path / "run", quiet=True)
    logged = [r for r in read_log(tmp_path / "run") if r["event"] == "step"][:5]

    data = prepare_data(recipe, progress=False)
    documents = data.train.select(data.train.for_class(0))
    model = build_model(
        recipe,
        vocab_size=data.tokenizer.vocab_size,
        eos_token_id=data.tokenizer.eos_token_id,
    ).transformers_model
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
    )
    batches = epoch_batches(
        documents.lengths, global_batch_tokens=None, global_batch_size=4, seed=0, epoch=0
    )
    rates = [recipe.learning_rate * x for x in (1 / 2, 1, 1, 2 / 3, 1 / 3)]
    for row, batch, rate in zip(logged, batches, rates, strict=False):
        loss, num_tokens = torch.zeros(()), 0
        for index in batch:
            ids = torch.from_numpy(documents.document(int(index)).astype(np.int64))[None]
            predicted = ids.shape[1] - 1
            loss = loss + model(input_ids=ids, labels=ids).loss * predicted
            num_tokens += predicted
        (loss / num_tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item() / num_tokens, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert row["grad_norm"] > 0.5  # so that clipping matters
        assert row["learning_rate"] == pytest.approx(rate)
    assert logged[-1]["tokens"] == sum((documents.lengths[b] - 1).sum() for b in batches[:5])
