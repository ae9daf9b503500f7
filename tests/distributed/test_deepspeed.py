"""ZeRO under our loop, two gloo processes or one that offloads: the training of one process."""

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from accel_gpt2.errors import ExitCode
from accel_gpt2.recipe import TrainRecipe

from .harness import run
from .runs import RTOL, Runs, assert_alike, checkpoint_of, data_of, steps_of
from .sharding import scores_of, train_with_less_memory
from .trainings import train, train_each, train_until
from .zero import (
    gone_on,
    is_let_go_of,
    norms_of_repeated,
    own_elements,
    probed_alone,
    steps_of_scales,
    train_without_compiler,
)

_TINY = TrainRecipe(
    model="gpt2-tiny", init="scratch", max_length=64, dropout=0.0, adam_epsilon=1e-5
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux")

STRATEGIES = ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
OFFLOADING = ["zero2_offload", "zero3_offload"]

# All accumulate, and have a last batch of fewer documents than there are processes.
VARIANTS = ["checkpointed", "clipped", "lora checkpointed"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All trainings of this file."""
    return Runs(tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module", params=STRATEGIES)
def trained(request: pytest.FixtureRequest, runs: Runs) -> tuple[str, Mapping[str, Path]]:
    """A strategy, and what two processes made of each variant under it."""
    strategy: str = request.param
    made = {name: runs.folder / f"{strategy} {name}" for name in VARIANTS}
    trainings = [(runs.recipe(name), made[name]) for name in VARIANTS]
    run(strategy, 2, train_each, trainings, timeout_seconds=300.0)
    return strategy, made


def test_two_processes_train_the_model_of_one(
    runs: Runs, trained: tuple[str, Mapping[str, Path]]
) -> None:
    """Losses and gradient norms of each step, validation scores, and every exported tensor."""
    strategy, made = trained
    assert len(made) == 3
    for variant, directory in made.items():
        assert json.loads((directory / "plan.json").read_text())["world_size"] == 2, strategy
        assert_alike(directory, runs.alone(variant))


def test_transformers_alone_scores_what_was_trained(
    runs: Runs, trained: tuple[str, Mapping[str, Path]]
) -> None:
    """The export is whole fp32 tensors and a tied head, and gives the validation scores."""
    directory = trained[1]["clipped"]
    (final,) = directory.glob("*/final")
    tensors = load_file(final / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.numel() > 0 for tensor in tensors.values())
    (scores,) = directory.glob("*/validation_scores/*.npy")
    model = AutoModelForCausalLM.from_pretrained(final, local_files_only=True).eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    documents = data_of(runs).validation
    found = []
    for index in range(len(documents)):
        tokens = torch.from_numpy(documents.document(index).astype(np.int64))[None]
        with torch.no_grad():
            loss = model(tokens, labels=tokens).loss
        found.append(-float(loss) * (tokens.numel() - 1))
    np.testing.assert_allclose(np.load(scores), found, rtol=1e-5)


@pytest.mark.parametrize("strategy", OFFLOADING)
def test_a_single_process_offloads(runs: Runs, strategy: str) -> None:
    """One card with its host's memory: the same training, and nothing is compiled for it."""
    directory, compiled = runs.folder / f"{strategy} alone", runs.folder / f"{strategy} compiled"
    recipe = runs.recipe("full")
    assert run(strategy, 1, train_without_compiler, recipe, directory, compiled) == [[]]
    assert_alike(directory, runs.alone("full"))


@pytest.mark.parametrize(
    ("strategy", "mixed_precision"),
    [*((strategy, "no") for strategy in STRATEGIES), ("zero2", "bf16"), ("zero3", "bf16")],
)
def test_a_backend_goes_on_bit_for_bit(strategy: str, mixed_precision: str) -> None:
    """From whole weights and moments the next step is the one that would have been."""
    recipe = dataclasses.replace(_TINY, mixed_precision=mixed_precision, dropout=0.1)
    (expected, found), _ = run(strategy, 2, gone_on, recipe)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_stopped_run_goes_on_bit_for_bit(runs: Runs) -> None:
    """A SIGTERM to one rank stops both, saved; then dropout too is drawn as if nothing was."""
    recipe = runs.recipe("full", dropout=0.1)
    whole, stopped = runs.folder / "whole", runs.folder / "stopped"
    run("zero3", 2, train, recipe, whole)
    codes = run("zero3", 2, partial(train_until, question=4, rank=1), recipe, stopped)
    assert codes == [ExitCode.STOPPED, ExitCode.STOPPED]
    assert len(steps_of(stopped)) == 3
    run("zero3", 2, train, recipe, stopped)
    assert_alike(stopped, whole, rtol=0)


@pytest.fixture(scope="module")
def stopped(runs: Runs) -> Mapping[str, Path]:
    """The training of "full", stopped after three steps under some strategies."""
    found = {}
    for strategy, num_processes in {
        "single": 1,
        "zero1": 2,
        "zero3": 2,
        "zero2_offload": 1,
    }.items():
        found[strategy] = runs.folder / f"stopped {strategy}"
        stop = partial(train_until, question=4, rank=num_processes - 1)
        run(strategy, num_processes, stop, runs.recipe("full"), found[strategy])
    return found


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "zero2_offload"])
def test_a_checkpoint_is_that_of_one_process(stopped: Mapping[str, Path], strategy: str) -> None:
    """Whole weights and moments, by the same names and numbers, and the same place."""
    own, expected = (checkpoint_of(stopped[name]) for name in (strategy, "single"))
    assert own.state.step == expected.state.step == 3
    torch.testing.assert_close(own.weights, expected.weights, rtol=RTOL, atol=RTOL)
    optimizers = [item.optimizer["optimizer"] for item in (own, expected)]
    assert optimizers[0]["param_groups"] == optimizers[1]["param_groups"]
    assert len(optimizers[1]["state"]) == len(expected.weights)
    torch.testing.assert_close(optimizers[0]["state"], optimizers[1]["state"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("before", "after"),
    [("zero3", "single"), ("single", "zero3"), ("zero1", "ddp"), ("zero2_offload", "zero3")],
)
def test_a_run_goes_on_under_another_strategy(
    runs: Runs, stopped: Mapping[str, Path], before: str, after: str
) -> None:
    """On another number of processes, in more shares or fewer: the same training."""
    directory = runs.folder / f"{before} to {after}"
    shutil.copytree(stopped[before], directory, symlinks=True)
    run(after, 1 if after == "single" else 2, train, runs.recipe("full"), directory)
    assert_alike(directory, runs.alone("full"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Two steps of one process."""
    return run("single", 1, steps_of_scales, _TINY, [0.01, 0.01])[0]


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_gradients_that_are_not_finite_change_nothing(strategy: str, alone: dict[str, Any]) -> None:
    """Neither weights nor moments nor what the next step accumulates, as on one process."""
    scales = [0.01, math.nan, math.inf, 0.01]
    found, _ = run(strategy, 2, steps_of_scales, _TINY, scales)
    assert np.isfinite(found["norms"]).tolist() == [True, False, False, True]
    np.testing.assert_allclose([found["norms"][0], found["norms"][3]], alone["norms"], rtol=RTOL)
    torch.testing.assert_close(found["after"], alone["after"], rtol=RTOL, atol=RTOL)
    states = [item["optimizer"]["state"] for item in (found, alone)]
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_bf16_keeps_the_weights_in_fp32(strategy: str, alone: dict[str, Any]) -> None:
    """They begin as they are, not rounded, and keep steps too small for bf16; none is skipped in
    vain, and one that is not finite changes nothing."""
    recipe = dataclasses.replace(_TINY, mixed_precision="bf16", learning_rate=1e-6)
    found, _ = run(strategy, 2, steps_of_scales, recipe, [math.nan, 0.01])
    torch.testing.assert_close(found["before"], alone["before"], rtol=0, atol=0)
    assert np.isfinite(found["norms"]).tolist() == [False, True]
    states = found["optimizer"]["state"].values()
    assert {float(own["step"]) for own in states} == {1.0}
    for name, tensor in found["after"].items():
        moved = (tensor - alone["before"][name]).abs()
        assert moved.max() < 1.1e-6, name  # AdamW's first step is as long as its learning rate
        assert moved.max() > 0 or tensor.ndim < 2, name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_gradients_are_added_up_in_fp32(strategy: str) -> None:
    """Twenty micro batches that are alike have twenty times the gradient of one. Stage 1 rounds the
    sum once, to exchange it; stage 2's offload, whose fp32 sums the GPU would hold, each time."""
    recipe = dataclasses.replace(_TINY, mixed_precision="bf16", learning_rate=1e-12)
    (one, twenty), _ = run(strategy, 2, norms_of_repeated, recipe, [1, 20])
    assert 0.1 < one < 10
    off = abs(twenty / (20 * one) - 1)
    least, most = {"zero1": (0.0, 2e-4), "zero2_offload": (2e-4, 2e-3)}.get(strategy, (0.0, 1e-6))
    assert least <= off < most


def test_each_process_holds_its_share(alone: dict[str, Any]) -> None:
    """fp32 weights and moments: half of each, and with ZeRO-3 of the weights between steps too."""
    total = sum(tensor.numel() for tensor in alone["before"].values())
    for strategy in ("zero1", "zero2", "zero3"):
        for held in run(strategy, 2, own_elements, _TINY):
            assert 0.5 <= held["fp32 weights"] / total < 0.51
            assert held["moments"] == held["fp32 weights"]
            if strategy == "zero3":
                assert held["weights"] / total < 0.51
            else:
                assert held["weights"] == total


@pytest.mark.parametrize("lengths", [[9], [60, 50, 40, 30, 20]])
def test_a_rank_without_a_document_takes_part(lengths: list[int]) -> None:
    """Each document is scored once on whatever rank, and the weights are as they were."""
    ((expected, weights),) = run("single", 1, scores_of, _TINY, lengths)
    first, second = run("zero3", 2, scores_of, _TINY, lengths)
    np.testing.assert_allclose(first[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(first[0], second[0])
    torch.testing.assert_close(first[1], weights, rtol=0, atol=0)
    assert second[1] == {}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_probes_its_memory_alone(strategy: str) -> None:
    """It waits for nobody, keeps gradients where training does, and leaves no trace of them."""
    (gradients, probed, expected), _ = run(strategy, 2, probed_alone, _TINY)
    total = sum(tensor.numel() for tensor in expected.values())
    assert gradients == (total if strategy == "zero1" else 0)
    torch.testing.assert_close(probed, expected, rtol=0, atol=0)


def test_memory_that_runs_out_within_a_block_halves_on_both(runs: Runs) -> None:
    """No rank is left waiting in an exchange, and the training is the same."""
    recipe = runs.recipe("full", micro_batch_tokens=128)
    directory = runs.folder / "less memory"
    run("zero3", 2, partial(train_with_less_memory, tokens=70, rank=1), recipe, directory)
    used = yaml.safe_load((directory / "recipe.yaml").read_text())
    assert used["micro_batch_tokens"] <= 70
    assert_alike(directory, runs.alone("full"))


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_trained_model_is_let_go_of(strategy: str) -> None:
    """The next class's has the memory for itself."""
    assert run(strategy, 2, is_let_go_of, _TINY) == [True, True]
