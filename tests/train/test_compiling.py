"""Compiled blocks give what the ones that they are made of give."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from accel_gpt2.catalog.gpus import GPUS
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.errors import UserError
from accel_gpt2.plan.compiling import CompilingPlan, compiling_problem, plan_compiling
from accel_gpt2.recipe import Switch, TrainRecipe
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.compiling import as_written, compile_blocks, compiled_seconds, is_compiled
from accel_gpt2.train.model import build_model

CPU = torch.device("cpu")
RECIPE = TrainRecipe(model="gpt2-tiny", init="scratch", max_length=64, dropout=0.0)
# Rows and lengths that differ, and micro batches of one row, which have a program of their own.
SHAPES = ((3, 9), (2, 30), (1, 17))


_LORA = {"finetuning": "lora", "lora_target_modules": ("c_attn",)}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    """Programs of one test are not another's, and their number is not."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(recipe: TrainRecipe) -> LanguageModel:
    model = build_model(recipe, vocab_size=128, eos_token_id=0).train()
    assert isinstance(model, LanguageModel)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # LoRA's B starts at zero, and so would A's gradient
        if parameter.requires_grad and not parameter.any():
            parameter.data.normal_(0, 0.05, generator=generator)
    return model


def _tensors(model: LanguageModel, rows: int, length: int) -> list[torch.Tensor]:
    tokens = np.random.default_rng(length).integers(0, 128, (rows, length + 1))
    batch = model.collate(list(tokens), np.zeros(rows, dtype=np.int64), epoch=0)
    return [torch.from_numpy(array) for array in batch]


def _assert_equal(
    compiled: LanguageModel, plain: LanguageModel, shapes: Sequence[tuple[int, int]] = SHAPES
) -> None:
    for shape in shapes:
        losses = []
        for model in (compiled, plain):
            model.zero_grad()
            loss = model(*_tensors(model, *shape)) / (shape[0] * shape[1])
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        pairs = zip(compiled.named_parameters(), plain.named_parameters(), strict=True)
        for (name, mine), (_, its) in pairs:
            assert (mine.grad is None) == (its.grad is None)
            if mine.grad is not None and its.grad is not None:
                near = 1e-5 * float(its.grad.abs().max())
                torch.testing.assert_close(mine.grad, its.grad, rtol=1e-5, atol=near, msg=name)


@pytest.mark.parametrize(
    "options",
    [{}, _LORA, {"gradient_checkpointing": True}, {"packing": "on"}],
    ids=["full", "lora", "checkpointing", "packed"],
)
def test_traced_blocks_give_the_same_losses_and_gradients(options: dict[str, Any]) -> None:
    """What dynamo and autograd make of the blocks, run as it is: two programs for all shapes, and
    names as they were."""
    from torch._dynamo.utils import counters

    plain = _model(dataclasses.replace(RECIPE, **options))
    compiled = copy.deepcopy(plain)
    for model in (plain, compiled):
        model.pack_rows(dataclasses.replace(RECIPE, **options), torch.device("cpu"))
    counters.clear()
    assert compile_blocks(compiled, backend="aot_eager") == 2
    # Another kind of block is traced anew for one row too, which takes as long again.
    _assert_equal(compiled, plain, SHAPES[: 2 if options else 3])
    assert compiled_seconds() > 0
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert list(compiled.trainable_state()) == list(plain.trainable_state())


def test_scoring_runs_the_blocks_as_they_are_written() -> None:
    """Bit for bit the scores of a model that nobody compiled, and nothing is compiled for them."""
    plain = _model(RECIPE)
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, backend="aot_eager")
    documents = [np.arange(1, 12), np.arange(3, 9)]
    before = compiled_seconds()
    with as_written():
        scores = compiled.score(documents, CPU)
    assert torch.equal(scores, plain.score(documents, CPU))
    assert compiled_seconds() == before


@pytest.mark.slow
def test_kernels_give_the_same_losses_and_gradients() -> None:
    """Inductor's own kernels, written and compiled: to 1e-5."""
    plain = _model(RECIPE)
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled)
    _assert_equal(compiled, plain)


SURE, VAIN = (CompilingPlan(seconds=60, saved_seconds=saved) for saved in (1000.0, 0.0))


def test_auto_compiles_what_is_repaid_and_on_what_can_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The arithmetic decides for auto; on and off are the person's; programs go to our cache."""
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as an optimizer has it
    single = STRATEGIES["single"]
    rows: list[tuple[Switch, CompilingPlan, bool]] = [
        ("auto", SURE, True),
        ("auto", VAIN, False),
        ("on", VAIN, True),
        ("off", SURE, False),
    ]
    for chosen, plan, expected in rows:
        recipe = dataclasses.replace(RECIPE, compile=chosen)
        assert is_compiled(recipe, single, CPU, plan) is expected, chosen
    assert cache_dir() == str(tmp_path / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    is_compiled(RECIPE, single, CPU, SURE)
    assert cache_dir() == str(tmp_path / "mine")
    quantised = dataclasses.replace(RECIPE, finetuning="qlora")
    assert not is_compiled(quantised, single, CPU, SURE)
    with pytest.raises(UserError, match=r"compile = 'on': the kernels .*--set compile=off"):
        is_compiled(dataclasses.replace(quantised, compile="on"), single, CPU, SURE)
    assert compiling_problem(RECIPE, STRATEGIES["fsdp2"]) is not None


def test_a_machine_without_a_compiler_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """No C++ compiler: auto goes on without, and on says what is missing."""
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    single = STRATEGIES["single"]
    assert not is_compiled(dataclasses.replace(RECIPE, compile="auto"), single, CPU, SURE)
    with pytest.raises(UserError, match=r"no C\+\+ compiler .*; give --set compile=off"):
        is_compiled(dataclasses.replace(RECIPE, compile="on"), single, CPU, SURE)


def test_a_short_run_and_a_cpu_are_not_compiled_for() -> None:
    """An hour on an H100 repays it, five minutes do not, and on a CPU nothing does."""
    h100 = GPUS["h100-80"]
    assert [plan_compiling(x, h100).pays for x in (300.0, 3600.0)] == [False, True]
    assert not plan_compiling(1e6, None).pays
