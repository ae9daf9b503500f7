"""Weights are cast to 16 bits once in a step, and the training stays what it was."""

import contextlib
import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.backend import PlainBackend
from accel_gpt2.train.casts import casts_kept
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import TrainedModel
from accel_gpt2.train.processes import build_accelerator

RECIPE = TrainRecipe(
    model="gpt2-tiny",
    init="scratch",
    dropout=0.0,
    max_length=32,
    mixed_precision="bf16",
    learning_rate=1e-2,
)
MICRO_BATCHES = 3


class _CountedCasts(TorchDispatchMode):
    """How often a block's weights are copied to bf16."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.number = 0
        # Two transposed projections of the same size may not be taken for one another's.
        self._weights = {
            parameter.data_ptr()
            for name, parameter in model.named_parameters()
            if ".h." in name and parameter.dim() == 2
        }

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.number += args[0].data_ptr() in self._weights
        return function(*args, **(kwargs or {}))

    @property
    def num_weights(self) -> int:
        return len(self._weights)


def _backends(recipe: TrainRecipe) -> tuple[PlainBackend, PlainBackend]:
    accelerator = build_accelerator(recipe)
    model = build_model(recipe, vocab_size=97, eos_token_id=0).train()
    kept, plain = (PlainBackend(accelerator, copy.deepcopy(model), recipe) for _ in range(2))
    return kept, plain


def _step(backend: PlainBackend, recipe: TrainRecipe, *, kept: bool) -> int:
    """One optimizer step; the number of copies that were made of each weight of a block."""
    random = np.random.default_rng(1)
    with (
        casts_kept(recipe) if kept else contextlib.nullcontext(),
        _CountedCasts(backend.plain_model) as casts,
    ):
        for number in range(MICRO_BATCHES):
            batch = backend.plain_model.collate(
                [random.integers(0, 97, 20)], np.zeros(1, np.int64), epoch=0
            )
            tensors = tuple(torch.from_numpy(x) for x in batch)
            backend.run(tensors, scale=0.02, last=number == MICRO_BATCHES - 1)
    backend.update(1.0)
    assert casts.num_weights == 8  # four of each of two blocks
    return casts.number // casts.num_weights


def test_one_copy_of_each_weight_in_a_step_and_the_same_bits() -> None:
    """Weights that the optimizer has changed are copied anew; all are equal after three steps."""
    kept, plain = _backends(RECIPE)
    for _ in range(3):
        assert _step(kept, RECIPE, kept=True) == 1
        assert _step(plain, RECIPE, kept=False) == MICRO_BATCHES
    weights, expected = (dict(x.plain_model.named_parameters()) for x in (kept, plain))
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name


def test_what_another_left_in_the_cache_is_not_taken() -> None:
    """Copies made where no gradient was wanted, by someone who keeps them, would have none."""
    kept, plain = _backends(RECIPE)
    weight = next(
        x for name, x in kept.plain_model.named_parameters() if ".h." in name and x.dim() == 2
    )
    torch.autocast_increment_nesting()
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            torch.ones(1, len(weight)) @ weight
        _step(kept, RECIPE, kept=True)
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
    _step(plain, RECIPE, kept=False)
    weights, expected = (dict(x.plain_model.named_parameters()) for x in (kept, plain))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": True}, {"placement": "shared-base"}]
)
def test_nothing_is_kept_where_it_would_cost_memory_or_mix_models(changes: dict[str, Any]) -> None:
    """Torch's cache ends with the outermost autocast there, as always."""
    recipe = dataclasses.replace(RECIPE, **changes)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    copies = []
    with casts_kept(recipe):
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                copies.append((weight @ weight).grad_fn.next_functions[0][0])  # type: ignore[union-attr]
    assert copies[0] is not copies[1]


def test_it_ends_with_a_step_that_fails() -> None:
    """No copy outlives an error, and the next autocast makes its own."""
    weight = torch.nn.Parameter(torch.zeros(4, 4))

    def fail() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            weight @ weight
        raise ValueError("a step")

    with pytest.raises(ValueError, match="a step"), casts_kept(RECIPE):
        fail()
    with torch.no_grad():
        weight.fill_(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (weight @ weight)[0, 0].item() == 4.0
