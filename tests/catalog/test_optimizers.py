"""Each optimizer's row says what a real step keeps in memory."""

import typing

import pytest
import torch
from torch import nn

from accel_gpt2.catalog.optimizers import OPTIMIZERS
from accel_gpt2.recipe import Optimizer, TrainRecipe
from accel_gpt2.train.optim import build_optimizer

SHAPES = ((1024, 1024), (1024, 768), (96, 40), (4096,), (4095,))


def _held_bytes(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    """Of one parameter's state; the quantisation maps of 8-bit states are shared by all."""
    return sum(
        value.nbytes
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap") and value.numel() > 1
    )


def _stepped(name: typing.Any, shape: tuple[int, ...], **recipe: typing.Any) -> int:
    """What the state of one tensor takes after a real step."""
    model = nn.Module()
    dtype = torch.bfloat16 if recipe else torch.float32
    parameter = model.weight = nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = build_optimizer(model, TrainRecipe(optimizer=name, **recipe))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return _held_bytes(optimizer, parameter)


def test_the_recipe_takes_exactly_these_optimizers() -> None:
    """A row without a choice, or a choice without a row, would be a lie of the catalog."""
    assert set(typing.get_args(Optimizer)) == set(OPTIMIZERS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_bytes_of_a_real_step(name: str, shape: tuple[int, ...]) -> None:
    """After one step the state of a tensor holds the row's bytes, large or small, to 1%."""
    row = OPTIMIZERS[name].state_bytes(shape, bf16=False)
    assert _stepped(name, shape) == pytest.approx(row, rel=0.01)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_bytes_of_bf16_weights(name: str, rounding: str) -> None:
    """The same for bf16 weights; a compensation is 2 bytes a parameter besides."""
    shape = (1024, 768)
    row = OPTIMIZERS[name].state_bytes(shape, bf16=True)
    compensation = 2 * 1024 * 768 if rounding == "kahan" else 0
    held = _stepped(name, shape, mixed_precision="pure_bf16", bf16_rounding=rounding)
    assert held == pytest.approx(row + compensation, rel=0.01)
