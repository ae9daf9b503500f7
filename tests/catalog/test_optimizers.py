"""Each optimizer's row says what a real step keeps in memory."""

import typing

import pytest
import torch

from accel_gpt2.catalog.optimizers import OPTIMIZERS
from accel_gpt2.recipe import Optimizer, TrainRecipe
from accel_gpt2.train.optim import build_optimizer


def test_the_recipe_takes_exactly_these_optimizers() -> None:
    """A row without a choice, or a choice without a row, would be a lie of the catalog."""
    assert set(typing.get_args(Optimizer)) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_bytes_of_a_real_step(name: typing.Any) -> None:
    """After one step over a large matrix the state holds the row's bytes per parameter, to 1%."""
    model = torch.nn.Linear(1024, 1024, bias=False)
    optimizer = build_optimizer(model, TrainRecipe(optimizer=name))
    model(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    # The quantisation maps of the 8-bit states are shared by all parameters.
    (state,) = optimizer.state.values()
    held = sum(
        value.nbytes
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap")
    )
    row = OPTIMIZERS[name].state_bytes_per_parameter
    assert held / model.weight.numel() == pytest.approx(row, rel=0.01, abs=0.02)
