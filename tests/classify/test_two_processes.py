"""Two gloo processes: the model of one, stopped, resumed, on another number, and going wrong."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import GPT2Config

from accel_gpt2.classify.evaluate import evaluate_run
from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.prepare import prepare_data
from accel_gpt2.errors import ExitCode
from accel_gpt2.recipe.layers import read_layer, to_yaml
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train.checkpoint import Checkpoint, list_checkpoints, read_checkpoint
from accel_gpt2.train.schedule import BatchSchedule
from tests.conftest import write_texts

from .conftest import read_log, resolve_tiny
from .runs import ROUNDING_STAYS_SMALL, assert_close_models, losses
from .two_processes import documents_noted, stopped_at_question


@pytest.fixture(scope="module")
def two_processes(
    trained_run: Path,
    tmp_path_factory: pytest.TempPathFactory,
    session_cache: Path,
) -> Path:
    """A folder with what one process and what two gloo processes made of the same recipes."""
    folder = tmp_path_factory.mktemp("two")
    texts_file = write_texts(folder / "texts.csv", documents_per_class=30, num_classes=2)
    changes = {**ROUNDING_STAYS_SMALL, "micro_batch_tokens": 64}
    base = str(next(trained_run.glob("class-0-*/final")))
    narrow = GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64)
    narrow.save_pretrained(folder / "narrow")
    adapter = {"model": base, "init": "pretrained", "tokenizer": "auto"}
    recipes: dict[str, dict[str, Any]] = {
        "full": {},
        "lora": {**adapter, "finetuning": "lora"},
        "qlora": {**adapter, "finetuning": "qlora"},
        "hybrid": {"objective": "hybrid"},
        "classification": {"objective": "classification"},
        "masked_lm": {"objective": "masked_lm", "model": "roberta-tiny"},
        "bf16": {
            "model": str(folder / "narrow"),  # CPUs are slow in bf16
            "init": "scratch",
            "tokenizer": "train",
            "mixed_precision": "pure_bf16",
        },
    }
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        patch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
        for name, more in recipes.items():
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
        talk = [process.communicate(timeout=480)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(talk)[-6000:]
    return folder


@pytest.mark.parametrize(
    "recipe", ["full", "lora", "qlora", "hybrid", "classification", "masked_lm"]
)
def test_two_processes_train_the_model_of_one(two_processes: Path, recipe: str) -> None:
    """Two gloo processes with their own micro batches: same losses, same weights, same scores."""
    one, two = (two_processes / f"{number}-{recipe}" for number in ("one", "two"))
    assert json.loads((two / "plan.json").read_text())["world_size"] == 2
    assert_close_models(two, one, rtol=1e-5)
    of_one, of_two = (np.array([x[2] for x in losses(run)]) for run in (one, two))
    np.testing.assert_allclose(of_two, of_one, rtol=1e-5, atol=1e-5)
    tables = [
        pq.read_table(run / "evaluation" / "scores.parquet").to_pandas() for run in (one, two)
    ]
    assert tables[0]["document"].is_unique
    assert (tables[0]["document"] == tables[1]["document"]).all()
    columns = [name for name in tables[0] if name.startswith("log_")]
    assert len(columns) == 2
    np.testing.assert_allclose(tables[1][columns], tables[0][columns], atol=1e-3)
    metrics = [json.loads((run / "evaluation" / "metrics.json").read_text()) for run in (one, two)]
    assert metrics[0]["confusion_matrix"] == metrics[1]["confusion_matrix"]


def test_two_processes_round_bf16_weights_alike(two_processes: Path) -> None:
    """After every step both processes hold the same bits; losses are one process's, up to what
    bf16 gradients lose when they are added in another order."""
    seen = _seen(two_processes)
    assert len(seen[0]["weights"]) == 16
    assert len(set(seen[0]["weights"])) == 16
    assert seen[0]["weights"] == seen[1]["weights"]
    of_one, of_two = (
        np.array([x[2] for x in losses(two_processes / f"{number}-bf16")])
        for number in ("one", "two")
    )
    np.testing.assert_allclose(of_two, of_one, rtol=2e-3)


@pytest.mark.parametrize(
    ("recipe", "number"),
    [("full", 4), ("full", 8), ("lora", 4), ("lora", 8), ("bf16", 4)],  # 8: at an epoch's end
)
def test_two_processes_stopped_and_resumed_are_the_same(
    two_processes: Path, recipe: str, number: int
) -> None:
    """A signal to one process stops both, agreed and saved; bit for bit, losses and tensors."""
    run = two_processes / f"two-{recipe}-stopped-{number}"
    seen = _seen(two_processes)
    assert [rank[run.name] for rank in seen] == [ExitCode.STOPPED, ExitCode.STOPPED]
    assert any(row["event"] == "resume" for row in read_log(run))
    whole = two_processes / f"two-{recipe}"
    assert_close_models(run, whole, rtol=0)
    assert losses(run) == losses(whole)


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
        assert_close_models(two_processes / resumed, two_processes / "two-full", rtol=1e-5)

    # Every document as often as the steps that were left have it, whichever process took it.
    data = prepare_data(resolved.recipe, progress=False)
    left: list[int] = []
    for index in range(2):
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
    assert "micro_batch_halved" in [row["event"] for row in read_log(run)]
    assert_close_models(run, two_processes / "two-full", rtol=1e-5)


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
