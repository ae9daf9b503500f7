"""Gradients that are freed as they come: the same training, and little of them at a time."""

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.backend import Backend, PlainBackend, build_backend
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import TrainedModel, to_device
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.released import ReleasingBackend

RECIPE = TrainRecipe(
    model="gpt2-tiny",
    init="scratch",
    dropout=0.0,
    max_length=64,
    learning_rate=1e-2,
    max_grad_norm=0.0,
    global_batch_size=1,
    global_batch_tokens=None,
)
DOCUMENTS = [np.array([0, *range(3, 40), 0]), np.array([0, 9, 7, 5, 0]), np.arange(30)]


def _backends(**changes: Any) -> tuple[Backend, Backend]:
    """A training that keeps its gradients, and one that releases them, of equal models."""
    recipe = dataclasses.replace(RECIPE, **changes)
    accelerator = build_accelerator(recipe)
    model = build_model(recipe, vocab_size=97, eos_token_id=0)
    found = tuple(
        build_backend(accelerator, copy.deepcopy(model), each)
        for each in (recipe, dataclasses.replace(recipe, release_gradients=True))
    )
    assert [type(backend) for backend in found] == [PlainBackend, ReleasingBackend]
    return found[0], found[1]


def _tensors(model: TrainedModel, number: int) -> tuple[torch.Tensor, ...]:
    device = next(model.parameters()).device
    return to_device(model.collate([DOCUMENTS[number]], np.zeros(1, np.int64), epoch=0), device)


def _step(backend: Backend, *documents: int) -> float:
    """One optimizer step, a micro batch for each document; the gradients' norm."""
    for count, number in enumerate(documents, start=1):
        tensors = _tensors(backend.plain_model, number)
        backend.run(tensors, scale=0.01, last=count == len(documents))
    return backend.update(math.inf).read()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_it_trains_as_without_bit_for_bit(optimizer: Any, checkpointing: bool) -> None:
    """Each parameter takes the same step from the same gradient, also over two micro batches."""
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    kept, released = _backends(optimizer=optimizer, gradient_checkpointing=checkpointing)
    for documents in ((0,), (1, 2), (2,)):
        assert _step(released, *documents) == pytest.approx(_step(kept, *documents), rel=1e-5)
    mine, theirs = (x.plain_model.trainable_state() for x in (released, kept))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    saved, expected = (x.gathered_optimizer_state() for x in (released, kept))
    assert saved["state"].keys() == expected["state"].keys()


def test_no_more_than_one_gradient_is_there() -> None:
    """Whenever a parameter is stepped, its gradient is the only one of the whole model."""
    _, released = _backends()
    alive: list[int] = []
    step = released.optimizer.optimizer.step

    def counting(closure: None = None) -> None:
        alive.append(sum(p.grad is not None for p in released.parameters))
        step(closure)

    released.optimizer.optimizer.step = counting
    _step(released, 0)
    assert alive == [1] * len(released.parameters)
    assert all(p.grad is None for p in released.parameters)


def test_the_learning_rate_of_the_step_is_taken_also_after_a_resume() -> None:
    """The loop sets it in the optimizer's groups, which loading a state replaces."""
    _, released = _backends()
    _step(released, 0)
    released.load_optimizer_state(copy.deepcopy(released.gathered_optimizer_state()))
    for group in released.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    before = [p.detach().clone() for p in released.parameters]
    assert _step(released, 0) > 0
    assert all(map(torch.equal, released.parameters, before))


def test_a_gradient_that_is_not_finite_steps_nothing() -> None:
    """The weight that it is of stays, and the norm says so to the loop."""
    _, released = _backends()
    poisoned = released.plain_model.get_parameter("model.transformer.h.0.attn.c_attn.weight")
    poisoned.register_hook(lambda gradient: gradient * math.nan)
    before = poisoned.detach().clone()
    assert math.isnan(_step(released, 0))
    assert torch.equal(poisoned, before)
    assert poisoned.grad is None
    assert math.isnan(_step(released, 0))  # and not what was left of the step before


def test_a_rehearsal_frees_gradients_and_changes_nothing() -> None:
    """What fits is tried out with as little memory as the training has, and no weight moves."""
    _, released = _backends()
    before = [p.detach().clone() for p in released.parameters]
    with released.probing():
        released.plain_model(*_tensors(released.plain_model, 0)).backward()
    assert all(map(torch.equal, released.parameters, before))
    assert all(p.grad is None for p in released.parameters)
    assert released.update(math.inf).read() == 0.0


def test_pure_bf16_learns_so_too() -> None:
    """The optimizer that rounds by chance steps one parameter at a time as well."""
    kept, released = _backends(mixed_precision="pure_bf16")
    for _ in range(3):
        _step(kept, 0)
        _step(released, 0)
    with torch.no_grad():
        tensors = _tensors(kept.plain_model, 0)
        mine, theirs = (x.plain_model(*tensors).item() for x in (released, kept))
    assert mine == pytest.approx(theirs, rel=0.01)
