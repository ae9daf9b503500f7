"""Every strategy trains the model that one process trains: two processes, gloo, fp32."""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from accel_gpt2.data.batching import split_micro_batches
from accel_gpt2.errors import ExitCode
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.schedule import BatchSchedule

from .harness import run
from .runs import RTOL, VARIANTS, Runs, assert_alike, checkpoint_of, data_of, steps_of
from .sharding import (
    held,
    scores_of,
    steps_with_an_overflow,
    train_and_evaluate,
    train_with_less_memory,
)
from .trainings import train, train_until

# DeepSpeed's are in test_deepspeed.py.
STRATEGIES = ["ddp", "fsdp2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All trainings of this file."""
    return Runs(tmp_path_factory.mktemp("equivalence"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_the_model_of_one(runs: Runs, strategy: str, variant: str) -> None:
    """Losses and gradient norms of each step, validation scores, and every exported tensor."""
    one, two = runs.alone(variant), runs.together(strategy, variant)
    assert json.loads((two / "plan.json").read_text())["world_size"] == 2
    assert_alike(two, one)


def test_the_trainings_do_what_they_are_for(runs: Runs) -> None:
    """Steps have several micro batches, once a rank has an empty one, and clipping bites."""
    recipe = runs.recipe("full").recipe
    lengths = data_of(runs).train.lengths
    batches = BatchSchedule(lengths, recipe).epoch(0)
    steps = [split_micro_batches(lengths, x, world_size=2, micro_batch_tokens=48) for x in batches]
    assert sum(len(step) > 1 for step in steps) >= 4
    assert any(len(own) == 0 for step in steps for per_rank in step for own in per_rank)
    assert min(norm for _, norm in steps_of(runs.alone("clipped"))) > 0.5
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_alike(runs.alone("clipped"), runs.alone("full"))


def test_a_classifier_of_sharded_models_is_that_of_whole_ones(runs: Runs) -> None:
    """Two classes after one another, and in the same processes the scores of the test split."""
    recipe = runs.recipe("full", objective="generative", max_steps=2)
    tables = []
    for strategy, num_processes in {"single": 1, "fsdp2": 2}.items():
        directory = runs.folder / f"{strategy} classifier"
        run(strategy, num_processes, train_and_evaluate, recipe, directory)
        tables.append(pq.read_table(directory / "evaluation" / "scores.parquet").to_pandas())
    expected, found = tables
    assert found["document"].is_unique
    assert (found["document"] == expected["document"]).all()
    columns = [name for name in expected if name.startswith("log_")]
    assert len(columns) == 2
    np.testing.assert_allclose(found[columns], expected[columns], rtol=RTOL)


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_a_sharded_run_stops_and_goes_on_bit_for_bit(runs: Runs, variant: str) -> None:
    """A SIGTERM to one rank stops both, saved; then dropout too is drawn as if nothing was."""
    recipe = runs.recipe(variant, dropout=0.1, lora_dropout=0.1)
    whole, stopped = (runs.folder / f"{variant} {name}" for name in ("whole", "stopped"))
    run("fsdp2", 2, train, recipe, whole)
    codes = run("fsdp2", 2, partial(train_until, question=4, rank=1), recipe, stopped)
    assert codes == [ExitCode.STOPPED, ExitCode.STOPPED]
    assert len(steps_of(stopped)) == 3
    run("fsdp2", 2, train, recipe, stopped)
    assert_alike(stopped, whole, rtol=0)


@pytest.fixture(scope="module")
def stopped(runs: Runs) -> Mapping[str, Path]:
    """The training of "full", stopped after three steps under each strategy."""
    found = {}
    for strategy, num_processes in {"single": 1, "ddp": 2, "fsdp2": 2}.items():
        found[strategy] = runs.folder / f"stopped {strategy}"
        stop = partial(train_until, question=4, rank=num_processes - 1)
        run(strategy, num_processes, stop, runs.recipe("full"), found[strategy])
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_is_that_of_one_process(stopped: Mapping[str, Path], strategy: str) -> None:
    """Whole weights and moments, by the same names and numbers, and the same place."""
    own, expected = (checkpoint_of(stopped[name]) for name in (strategy, "single"))
    assert (own.state.step, own.state.tokens) == (expected.state.step, expected.state.tokens)
    assert (own.state.step, len(own.random_states)) == (3, 2)
    torch.testing.assert_close(own.weights, expected.weights, rtol=RTOL, atol=RTOL)
    optimizers = [item.optimizer["optimizer"] for item in (own, expected)]
    assert optimizers[0]["param_groups"] == optimizers[1]["param_groups"]
    assert len(optimizers[1]["state"]) == len(expected.weights)
    torch.testing.assert_close(optimizers[0]["state"], optimizers[1]["state"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("before", "after"), [("fsdp2", "single"), ("single", "fsdp2"), ("fsdp2", "ddp")]
)
def test_a_run_goes_on_under_another_strategy(
    runs: Runs, stopped: Mapping[str, Path], before: str, after: str
) -> None:
    """On another number of processes, or sharded from now on: the same training."""
    directory = runs.folder / f"{before} to {after}"
    shutil.copytree(stopped[before], directory, symlinks=True)
    run(after, 1 if after == "single" else 2, train, runs.recipe("full"), directory)
    assert_alike(directory, runs.alone("full"))


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_transformers_alone_scores_what_was_trained(runs: Runs, variant: str) -> None:
    """What a sharded training exports loads as any model, and gives its validation scores."""
    directory = runs.together("fsdp2", variant)
    (final,) = directory.glob("*/final")
    (scores,) = directory.glob("*/validation_scores/*.npy")
    model = AutoModelForCausalLM.from_pretrained(final, local_files_only=True).eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    documents = data_of(runs).validation
    found = []
    for index in range(len(documents)):
        tokens = torch.from_numpy(documents.document(index).astype(np.int64))[None]
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits
        log_p = logits.double().log_softmax(-1).gather(2, tokens[:, 1:, None])
        found.append(float(log_p.sum()))
    np.testing.assert_allclose(np.load(scores), found, rtol=1e-5)


_SHAPE = TrainRecipe(model="gpt2-tiny", init="scratch", max_length=64, dropout=0.0)


def test_each_process_holds_its_share() -> None:
    """Weights, the gradients of earlier micro batches and moments: half of each, and no more."""
    (one,) = run("single", 1, held, _SHAPE)
    two = run("fsdp2", 2, held, _SHAPE)
    for what, elements in one.items():
        assert sum(rank[what] for rank in two) == elements > 100_000
        assert max(rank[what] for rank in two) < 0.51 * elements


@pytest.mark.parametrize("lengths", [[9], [60, 50, 40, 30, 20]])
def test_a_rank_without_a_document_takes_part(lengths: list[int]) -> None:
    """Each document is scored once on whatever rank; and a save is whole on the first alone."""
    ((expected, weights),) = run("single", 1, scores_of, _SHAPE, lengths)
    first, second = run("fsdp2", 2, scores_of, _SHAPE, lengths)
    np.testing.assert_allclose(first[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(first[0], second[0])
    torch.testing.assert_close(first[1], weights, rtol=0, atol=0)
    assert second[1] == {}


def test_weights_are_saved_in_fp32_in_the_middle_of_a_pass_in_bf16() -> None:
    """What blocks compute with is rounded; what is saved is not."""
    recipe = dataclasses.replace(_SHAPE, mixed_precision="bf16")
    ((_, weights),) = run("single", 1, scores_of, recipe, [9])
    (_, saved), _ = run("fsdp2", 2, scores_of, recipe, [9])
    torch.testing.assert_close(saved, weights, rtol=0, atol=0)


def test_memory_that_runs_out_within_a_block_halves_on_both(runs: Runs) -> None:
    """No rank is left waiting in an exchange, and the training is the same."""
    recipe, directory = runs.recipe("full", micro_batch_tokens=128), runs.folder / "less memory"
    run("fsdp2", 2, partial(train_with_less_memory, tokens=70, rank=1), recipe, directory)
    used = yaml.safe_load((directory / "recipe.yaml").read_text())
    assert used["micro_batch_tokens"] <= 70
    assert_alike(directory, runs.alone("full"))


def test_an_overflow_on_one_rank_keeps_all_from_stepping() -> None:
    """fp16's scaler and the norm see all shards, so the ranks stay together; then it goes on."""
    first, second = run("fsdp2", 2, steps_with_an_overflow, _SHAPE, 1)
    assert first == second
    assert [(scale, changed) for _, scale, changed in first] == [(4, True), (2, False), (2, True)]
    assert [math.isfinite(norm) for norm, _, _ in first] == [True, False, True]
