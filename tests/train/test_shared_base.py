"""Several adapters on one base: what they share, what each has alone, and the stacked way."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.backend import MicroBatch, build_backend
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import TrainedModel, TransformersModel
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.shared_base import (
    StackedModels,
    Turn,
    share_frozen,
    try_stacking,
    why_not_stacked,
)

_CPU = torch.device("cpu")
_VOCAB_SIZE = 300


def _recipe(base: Path, **changes: Any) -> TrainRecipe:
    values: dict[str, Any] = {
        "model": str(base),
        "finetuning": "lora",
        "max_length": 64,
        "dropout": 0.0,
        **changes,
    }
    return TrainRecipe(**values)


def _build(recipe: TrainRecipe) -> TrainedModel:
    return build_model(
        recipe, vocab_size=_VOCAB_SIZE, eos_token_id=0, mask_token_id=1, pad_token_id=2
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 of random weights, as `from_pretrained` reads it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = _build(_recipe(Path("gpt2-tiny"), init="scratch", finetuning="full"))
    assert isinstance(model, TransformersModel)
    model.save_pretrained(folder)
    return folder


def _three_models(recipe: TrainRecipe) -> list[TrainedModel]:
    """Models on one base whose adapters differ, and do something."""
    first = _build(recipe)
    models = [first, share_frozen(first), share_frozen(first)]
    random = torch.Generator().manual_seed(0)
    for model in models:
        model.train()
        for parameter in _trained(model):
            parameter.data.normal_(0, 0.05, generator=random)
    return models


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _micro_batches(
    models: list[TrainedModel], recipe: TrainRecipe, lengths: list[list[int]]
) -> list[MicroBatch]:
    """Random documents of these lengths for each model."""
    random = np.random.default_rng(0)
    found = []
    for model, own in zip(models, lengths, strict=True):
        documents = [random.integers(3, _VOCAB_SIZE, n).astype(np.int64) for n in own]
        arrays = model.collate(documents, np.zeros(len(own), dtype=np.int64), epoch=0)
        found.append(
            MicroBatch(
                backend=build_backend(build_accelerator(recipe), model, recipe),
                tensors=tuple(torch.from_numpy(array) for array in arrays),
                scale=1 / sum(own),
                last=True,
            )
        )
    return found


_KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "checkpointing": {"gradient_checkpointing": True},
    "dora": {"use_dora": True},
    "nf4": {"finetuning": "qlora"},
    "int8": {"finetuning": "qlora", "quantization": "int8"},
}


@pytest.mark.parametrize("kind", _KINDS)
def test_copies_share_what_is_frozen_and_nothing_else(kind: str, base: Path) -> None:
    """Three models hold one base and three adapters, to the byte, and all compute the same."""
    if kind in {"nf4", "int8"}:
        pytest.importorskip("bitsandbytes")
    first = _build(_recipe(base, **_KINDS[kind])).train()
    adapter_bytes = sum(parameter.nbytes for parameter in _trained(first))
    base_bytes = _held_bytes([first]) - adapter_bytes
    assert 0 < adapter_bytes < base_bytes
    models = [first, share_frozen(first), share_frozen(first)]
    assert _held_bytes(models) == base_bytes + 3 * adapter_bytes
    input_ids = torch.arange(40).view(2, 20)
    tensors = (input_ids, input_ids.flatten(), torch.arange(40))
    losses = [model(*tensors) for model in models]
    assert losses[0].item() == losses[1].item() == losses[2].item()
    for loss in losses:
        loss.backward()
    for other in models[1:]:
        pairs = zip(first.named_parameters(), other.named_parameters(), strict=True)
        for (name, mine), (its_name, its) in pairs:
            assert name == its_name
            assert (mine.grad is None) == (not mine.requires_grad)
            if mine.grad is not None:
                torch.testing.assert_close(its.grad, mine.grad, rtol=0, atol=0, msg=name)


def _held_bytes(models: list[TrainedModel]) -> int:
    """Of all tensors that the models hold, quantisation's own included, each storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    pending: list[Any] = list(models)
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        if isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            pending += vars(item).values()
    return sum(storages.values())


def test_training_one_leaves_the_others_alone(base: Path) -> None:
    """A step of one model moves its own adapter, and neither the base nor another adapter."""
    recipe = _recipe(base)
    models = _three_models(recipe)
    before = [{n: p.detach().clone() for n, p in model.named_parameters()} for model in models]
    (micro_batch,) = _micro_batches(models[1:2], recipe, [[20, 12]])
    micro_batch.run()
    micro_batch.backend.step()
    for number, (model, old) in enumerate(zip(models, before, strict=True)):
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, old[n])}
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert moved == (trained if number == 1 else set())


@pytest.mark.parametrize("kind", ["lora", "checkpointing", "nf4", "int8"])
def test_stacked_losses_and_gradients_are_those_of_each_alone(kind: str, base: Path) -> None:
    """Batches of other sizes and lengths, stacked: each model's own to 1e-6 of its size."""
    if kind in {"nf4", "int8"}:
        pytest.importorskip("bitsandbytes")
    recipe = _recipe(base, **_KINDS[kind])
    models = _three_models(recipe)
    micro_batches = _micro_batches(models, recipe, [[30, 12], [21], [17, 16, 5]])
    stacked = StackedModels(models, build_accelerator(recipe), micro_batch_tokens=4096)
    for chosen in ([0, 1, 2], [2, 0]):  # one has come to its end
        own = [micro_batches[number] for number in chosen]
        losses = [item.run() for item in own]
        expected = [
            [x.grad.clone() for x in item.backend.parameters if x.grad is not None] for item in own
        ]
        for item in own:
            item.backend.zero_grad()
        together = stacked.run(own)
        for loss, wanted, item, gradients in zip(together, losses, own, expected, strict=True):
            torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
            assert not loss.requires_grad
            assert len(gradients) == len(item.backend.parameters) > 0
            for parameter, gradient in zip(item.backend.parameters, gradients, strict=True):
                assert parameter.grad is not None
                error = (parameter.grad - gradient).norm() / gradient.norm()
                assert error < 1e-6
            item.backend.zero_grad()


def test_a_trial_changes_nothing(base: Path) -> None:
    """It times both ways, and leaves weights as they were and no gradient."""
    recipe = _recipe(base)
    models = _three_models(recipe)
    micro_batches = _micro_batches(models, recipe, [[9, 8], [9, 8], [9]])
    before = [parameter.detach().clone() for model in models for parameter in _trained(model)]
    stacked = StackedModels(models, build_accelerator(recipe), micro_batch_tokens=64)
    trial = try_stacking(stacked, [micro_batches, micro_batches], _CPU)
    assert trial is not None
    assert trial.gain == trial.in_turn_seconds / trial.stacked_seconds > 0
    after = [parameter for model in models for parameter in _trained(model)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)
    full = StackedModels(models, build_accelerator(recipe), micro_batch_tokens=16)
    assert try_stacking(full, [micro_batches], _CPU) is None


@pytest.fixture(scope="module")
def stacked_up_to(base: Path) -> Callable[[int], StackedModels]:
    """Stacked models that hold at most so many tokens."""
    recipe = _recipe(base)
    models, accelerator = [_build(recipe)], build_accelerator(recipe)
    return lambda tokens: StackedModels(models, accelerator, micro_batch_tokens=tokens)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 99)), min_size=1, max_size=9),
    limit=st.integers(1, 2000),
)
def test_groups_hold_no_more_than_a_micro_batch(
    shapes: list[tuple[int, int]], limit: int, stacked_up_to: Callable[[int], StackedModels]
) -> None:
    """Every micro batch is in one group, and a group of several is within the limit, padded."""
    items: Any = [SimpleNamespace(tensors=(torch.empty(shape, device="meta"),)) for shape in shapes]
    groups = stacked_up_to(limit).groups(items)
    assert sorted(itertools.chain(*groups)) == list(range(len(shapes)))
    for group in groups:
        documents, longest = (max(shapes[i][axis] for i in group) for axis in (0, 1))
        assert len(group) == 1 or len(group) * documents * longest <= limit
    if sum(1 for _ in shapes) * max(d for d, _ in shapes) * max(n for _, n in shapes) <= limit:
        assert len(groups) == 1


def test_a_turn_has_random_numbers_and_seconds_of_its_own() -> None:
    """What is drawn in its turns is what is drawn alone, and its clock stands in between."""
    torch.manual_seed(1)
    alone = [torch.rand(3) for _ in range(3)]
    one, other = Turn(_CPU), Turn(_CPU)
    with one:
        torch.manual_seed(1)
        drawn = [torch.rand(3)]
    with other:
        torch.manual_seed(2)
        torch.rand(5)
    with one:
        drawn.append(torch.rand(3))
    before = one.clock()
    with other:
        time.sleep(0.02)
        torch.rand(1)
    assert one.clock() == before
    assert other.clock() >= 0.02
    with one:
        drawn.append(torch.rand(3))
        time.sleep(0.01)
        within = one.clock()
    assert one.clock() >= within >= before + 0.01
    one.add(2.0)
    assert one.clock() >= 2.0
    for mine, its in zip(drawn, alone, strict=True):
        assert torch.equal(mine, its)


def test_what_cannot_be_stacked_says_why(base: Path) -> None:
    """Each reason is told, and plain LoRA without dropout has none."""
    reasons: dict[str, dict[str, Any]] = {
        "dropout draws other numbers": {"dropout": 0.1},
        "lora_dropout=0 has none": {"lora_dropout": 0.1},
        "steps each class in its own backward pass": {
            "release_gradients": True,
            "max_grad_norm": 0.0,
        },
        "only LoRA of linear layers": {"use_dora": True},
        "the heads of masked language models": {
            "objective": "masked_lm",
            "model": "roberta-tiny",
            "init": "scratch",
        },
    }
    for words, changes in reasons.items():
        recipe = _recipe(base, **changes)
        assert words in str(why_not_stacked([_build(recipe)], recipe))
    recipe = _recipe(base)
    assert why_not_stacked([_build(recipe)], recipe) is None
