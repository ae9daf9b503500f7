"""Training end to end: the run directory, exact resume, accumulation, LoRA, signals, refusals."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from accel_gpt2.classify.evaluate import evaluate_run
from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.prepare import prepare_data
from accel_gpt2.classify.run import open_run
from accel_gpt2.data.batching import epoch_batches
from accel_gpt2.errors import ExitCode, StoppedEarly, UserError
from accel_gpt2.recipe import read_layer, resolve, to_yaml
from accel_gpt2.train.checkpoint import Checkpoint, list_checkpoints, read_checkpoint
from accel_gpt2.train.manifest import verify
from accel_gpt2.train.model import build_model
from accel_gpt2.train.schedule import BatchSchedule

from .conftest import read_log, resolve_tiny
from .two_processes import documents_noted, stopped_at_question

# Dropout draws other numbers for other shapes. AdamW divides by the gradient's size, so where that
# is near its default epsilon of 1e-8 it would turn a rounding difference into a whole step.
ROUNDING_STAYS_SMALL: dict[str, Any] = {"dropout": 0.0, "adam_epsilon": 1e-5, "max_steps": 8}


def _final_weights(run: Path) -> list[dict[str, torch.Tensor]]:
    files = sorted(run.glob("class-*/final/*.safetensors"))
    assert len(files) == 3, files
    return [load_file(file) for file in files]


def _assert_equal_weights(a: Path, b: Path, *, rtol: float) -> None:
    for mine, other in zip(_final_weights(a), _final_weights(b), strict=True):
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, other[name], rtol=rtol, atol=rtol)


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
    for index in range(3):
        folder = run.class_directory(index)
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


def _losses(run: Path) -> list[tuple[int, int, float]]:
    rows = {
        (row["class_index"], row["step"]): row["loss"]
        for row in read_log(run)
        if row["event"] == "step"
    }
    return [(*key, loss) for key, loss in sorted(rows.items())]


def test_small_micro_batches_equal_one_large_one(texts_file: Path, tmp_path: Path) -> None:
    """Accumulating over micro batches trains the same model as the global batch at once."""
    for name, tokens in (("large", 4096), ("small", 24)):
        fit(
            resolve_tiny(texts_file, micro_batch_tokens=tokens, **ROUNDING_STAYS_SMALL),
            tmp_path / name,
            quiet=True,
        )
    _assert_equal_weights(tmp_path / "small", tmp_path / "large", rtol=1e-5)
    losses = [np.array([x[2] for x in _losses(tmp_path / n)]) for n in ("small", "large")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.fixture(scope="module")
def two_processes(
    trained_run: Path,
    texts_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    session_cache: Path,
) -> Path:
    """A folder with what one process and what two gloo processes made of the same recipes."""
    folder = tmp_path_factory.mktemp("two")
    changes = {**ROUNDING_STAYS_SMALL, "micro_batch_tokens": 64}
    base = str(next(trained_run.glob("class-0-*/final")))
    lora = {"model": base, "init": "pretrained", "tokenizer": "auto", "finetuning": "lora"}
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        patch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
        for name, more in (("full", {}), ("lora", lora)):
            resolved = resolve_tiny(texts_file, **changes, **more)
            (folder / f"{name}.yaml").write_text(to_yaml(resolved.recipe))
            fit(resolved, folder / f"one-{name}", quiet=True)
            evaluate_run(folder / f"one-{name}", quiet=True)
            if name == "full":  # what two processes will go on from
                stopped_at_question(4, resolved, folder / "one-to-two", rank=0)
                shutil.copytree(folder / "one-to-two", folder / "one-stopped", symlinks=True)
        launched = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        script = Path(__file__).with_name("two_processes.py")
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(folder)],
                env={**os.environ, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
    try:
        talk = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(talk)[-6000:]
    return folder


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_two_processes_train_the_model_of_one(two_processes: Path, finetuning: str) -> None:
    """Two gloo processes with their own micro batches: same losses, same weights, same scores."""
    one, two = (two_processes / f"{number}-{finetuning}" for number in ("one", "two"))
    assert json.loads((two / "plan.json").read_text())["world_size"] == 2
    _assert_equal_weights(two, one, rtol=1e-5)
    losses = [np.array([x[2] for x in _losses(run)]) for run in (one, two)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    tables = [
        pq.read_table(run / "evaluation" / "scores.parquet").to_pandas() for run in (one, two)
    ]
    assert tables[0]["document"].is_unique
    assert (tables[0]["document"] == tables[1]["document"]).all()
    columns = [f"log_likelihood_{index}" for index in range(3)]
    np.testing.assert_allclose(tables[1][columns], tables[0][columns], atol=1e-3)
    metrics = [json.loads((run / "evaluation" / "metrics.json").read_text()) for run in (one, two)]
    assert metrics[0]["confusion_matrix"] == metrics[1]["confusion_matrix"]


@pytest.mark.parametrize("number", [4, 8], ids=["within-an-epoch", "at-its-end"])
@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_two_processes_stopped_and_resumed_are_the_same(
    two_processes: Path, finetuning: str, number: int
) -> None:
    """A signal to one process stops both, agreed and saved; bit for bit, losses and tensors."""
    run = two_processes / f"two-{finetuning}-stopped-{number}"
    seen = _seen(two_processes)
    assert [rank[run.name] for rank in seen] == [ExitCode.STOPPED, ExitCode.STOPPED]
    assert any(row["event"] == "resume" for row in read_log(run))
    whole = two_processes / f"two-{finetuning}"
    _assert_equal_weights(run, whole, rtol=0)
    assert _losses(run) == _losses(whole)


def test_another_number_of_processes_goes_on(two_processes: Path) -> None:
    """From two to one and from one to two: the same state, and what an epoch has left, once."""
    seen = _seen(two_processes)
    assert [rank["to-one"] for rank in seen] == [ExitCode.STOPPED, ExitCode.STOPPED]
    (by_one,), (by_two,) = (
        list_checkpoints(two_processes / name / "class-0-kitchen")
        for name in ("one-stopped", "two-to-one")
    )
    _assert_equal_state(read_checkpoint(by_one), read_checkpoint(by_two))

    resolved = resolve([read_layer(two_processes / "full.yaml")])
    with documents_noted() as documents:
        fit(resolved, two_processes / "two-to-one", quiet=True)
    for resumed in ("two-to-one", "one-to-two"):
        _assert_equal_weights(two_processes / resumed, two_processes / "two-full", rtol=1e-5)

    # Every document as often as the steps that were left have it, whichever process took it.
    data = prepare_data(resolved.recipe, progress=False)
    left: list[int] = []
    for index in range(3):
        mine = data.train.for_class(index)
        schedule = BatchSchedule(data.train.lengths[mine], resolved.recipe)
        batches = [*schedule.epoch(0), *schedule.epoch(1)][: schedule.total_steps]
        done = 3 if index == 0 else 0
        left += [int(row) for batch in batches[done:] for row in data.train.rows[mine][batch]]
    assert sorted(documents) == sorted(left)
    assert sorted(seen[0]["documents"] + seen[1]["documents"]) == sorted(left)


def _assert_equal_state(one: Checkpoint, two: Checkpoint) -> None:
    """Weights, moments and place of one process's checkpoint and of two processes' one."""
    assert (one.state.step, one.state.tokens, one.state.epoch, one.state.batch) == (
        two.state.step,
        two.state.tokens,
        two.state.epoch,
        two.state.batch,
    )
    assert [len(item.random_states) for item in (one, two)] == [1, 2]
    assert one.weights.keys() == two.weights.keys()
    for name, tensor in one.weights.items():
        torch.testing.assert_close(two.weights[name], tensor, rtol=1e-5, atol=1e-5)
    states = [item.optimizer["optimizer"]["state"] for item in (one, two)]
    assert states[0].keys() == states[1].keys()
    for index, moments in states[0].items():
        for name, tensor in moments.items():
            torch.testing.assert_close(states[1][index][name], tensor, rtol=1e-4, atol=1e-6)


def test_memory_that_runs_out_on_one_process_halves_on_both(two_processes: Path) -> None:
    """The probe is agreed on, so the ranks stay in step, and the model is the same."""
    run = two_processes / "two-memory"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["micro_batch_tokens"] <= 60
    assert [row["event"] for row in read_log(run)].count("micro_batch_halved") == 1
    _assert_equal_weights(run, two_processes / "two-full", rtol=1e-5)


def test_numbers_that_go_wrong_on_one_process_stop_both(two_processes: Path) -> None:
    """The same sentence on both, and the documents of the process that had them."""
    seen = _seen(two_processes)
    assert "are not finite, and nothing was saved" in seen[0]["nan"]
    assert seen[0]["nan"] == seen[1]["nan"]
    (path,) = (two_processes / "two-nan").glob("class-0-*/nonfinite.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 3
    assert all(item["loss"] == "nan" for x in records for item in x["micro_batches"])
    assert all(item["document_rows"] for x in records for item in x["micro_batches"])


def test_a_failure_of_the_writing_process_reaches_all(two_processes: Path) -> None:
    """A disk that is full on the first process ends the others too, with the same sentence."""
    seen = _seen(two_processes)
    assert "1000 B are free" in seen[0]["disk"]
    assert seen[1]["disk"] == seen[0]["disk"]


def test_fewer_documents_than_processes_are_scored(two_processes: Path) -> None:
    """A rank without a document takes part and has the score as well."""
    seen = _seen(two_processes)
    assert len(seen[0]["scores"]) == 1
    assert seen[0]["scores"][0] < 0
    assert seen[0]["scores"] == seen[1]["scores"]


def _seen(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


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
    _assert_equal_weights(run, tmp_path / "whole", rtol=0)
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
    losses = [loss for index, _, loss in _losses(tmp_path / "run") if index == 0]
    assert losses[-1] < losses[0] - 0.3
    for weights in _final_weights(tmp_path / "run"):
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


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
    assert len(_final_weights(tmp_path / "run")) == 3


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
