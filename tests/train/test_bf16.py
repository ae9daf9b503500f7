"""Weights in bf16: what rounding would lose is not lost, and nothing else changes."""

import copy
import dataclasses
import io
import itertools
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config

from accel_gpt2.catalog.optimizers import OPTIMIZERS
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.bf16 import cast_to_bf16, round_stochastically
from accel_gpt2.train.model import build_model
from accel_gpt2.train.optim import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state_bytes,
)

ALL = tuple(itertools.product(("adamw", "adamw_8bit", "adafactor"), ("stochastic", "kahan")))


def recipe(**changes: Any) -> TrainRecipe:
    """Pure bf16 of one's own optimizer; a language model of two small layers."""
    values: dict[str, Any] = {"model": "gpt2-tiny", "init": "scratch", "max_length": 64, **changes}
    return TrainRecipe(**{"mixed_precision": "pure_bf16", **values})


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Matrices large enough for 8-bit states, and vectors that are not."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64, bias=False)).to(dtype)


def step_with(model: nn.Module, optimizer: Optimizer, *seeds: int) -> None:
    """One step for each seed, with gradients that it alone decides, the same in any precision."""
    for seed in seeds:
        random = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=random).bfloat16()
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> list[Tensor]:
    """The parameters' values, apart from the model."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def saved_and_read(state: dict[str, Any]) -> dict[str, Any]:
    """A state through a file that is read without running code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


def test_rounding_by_chance_has_the_right_mean() -> None:
    """Only the two neighbours come, as often as their distances say, also below 0 and over 2^n."""
    numbers = torch.tensor([1 + 2**-9, -(1 + 3 * 2**-10), 1.99609375 + 2**-10, 3e-39, 1e-3, -7e8])
    repeats = 40_000
    rounded = torch.empty(repeats, len(numbers), dtype=torch.bfloat16)
    random = torch.Generator().manual_seed(0)
    round_stochastically(numbers.repeat(repeats, 1), rounded, random)
    for number, column in zip(numbers.double().tolist(), rounded.double().unbind(1), strict=True):
        low, high = sorted(set(column.tolist()))
        nearest = torch.tensor(number, dtype=torch.bfloat16)
        towards = torch.tensor(torch.inf * (number - nearest.item()), dtype=torch.bfloat16)
        assert {low, high} == {nearest.item(), nearest.nextafter(towards).item()}
        # Four standard deviations of a mean of coin tosses.
        chance = (number - low) / (high - low)
        tolerance = 4 * (high - low) * (chance * (1 - chance) / repeats) ** 0.5
        assert column.mean().item() == pytest.approx(number, abs=tolerance)


def test_what_bf16_can_hold_is_not_rounded() -> None:
    """Zero, infinities, powers of two and every other bf16 number stay themselves."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[~numbers.isnan()]
    assert len(numbers) == 2**16 - 2 * 127
    rounded = torch.empty_like(numbers)
    round_stochastically(numbers.float(), rounded, torch.Generator().manual_seed(0))
    assert torch.equal(rounded.view(torch.int16), numbers.view(torch.int16))


def test_small_steps_arrive_where_rounding_to_nearest_stands_still() -> None:
    """200 steps of 1e-4 from 1.0: torch's own AdamW does not move bf16 weights; ours arrive."""
    options: dict[str, Any] = {"learning_rate": 1e-4, "weight_decay": 0.0, "adam_epsilon": 1e-12}

    def end(of: TrainRecipe, dtype: torch.dtype) -> tuple[float, Optimizer, nn.Parameter]:
        model = nn.Linear(64, 64, bias=False).to(dtype)
        nn.init.ones_(model.weight)
        optimizer = build_optimizer(model, of)
        for _ in range(200):
            model.weight.grad = torch.full_like(model.weight, 0.5)
            optimizer.step()
        return model.weight.double().mean().item(), optimizer, model.weight

    assert end(recipe(mixed_precision="no", **options), torch.bfloat16)[0] == 1.0
    assert end(recipe(mixed_precision="no", **options), torch.float32)[0] == pytest.approx(
        0.98, abs=1e-5
    )
    # 4,096 weights, each a walk of 200 coin tosses over 2^-8: their mean is within 0.0002 or so.
    assert end(recipe(**options), torch.bfloat16)[0] == pytest.approx(0.98, abs=1e-3)
    mean, optimizer, weight = end(recipe(**options, bf16_rounding="kahan"), torch.bfloat16)
    kept = optimizer.state[weight]["compensation"].double().mean().item()
    assert mean == pytest.approx(0.98, abs=2**-9)
    assert mean + kept == pytest.approx(0.98, abs=1e-5)


@pytest.mark.parametrize("optimizer_name", ["adamw", "adamw_8bit", "adafactor"])
def test_compensated_weights_follow_fp32_ones(optimizer_name: str) -> None:
    """bf16 weight plus compensation is within 2% of the way that the library's fp32 went."""
    of = recipe(optimizer=optimizer_name, bf16_rounding="kahan", learning_rate=1e-4)
    exact = network(torch.bfloat16).float()  # from the same weights
    reference = build_optimizer(exact, recipe(**{**_of(of), "mixed_precision": "no"}))
    ours = network()
    optimizer = build_optimizer(ours, of)
    before = weights(exact)
    step_with(exact, reference, *range(50))
    step_with(ours, optimizer, *range(50))
    parameters = zip(before, exact.parameters(), ours.parameters(), strict=True)
    for start, fp32, bf16 in parameters:
        whole = bf16.float() + optimizer.state[bf16]["compensation"].float()
        way = (fp32 - start).norm()
        assert way > 0
        assert (whole - fp32).norm() < 0.02 * way
        assert (bf16.float() - fp32).norm() > 0.05 * way  # the weights alone do not say it


def _of(of: TrainRecipe) -> dict[str, Any]:
    return {"optimizer": of.optimizer, "learning_rate": of.learning_rate}


@pytest.mark.parametrize(("optimizer_name", "rounding"), ALL)
def test_a_saved_state_goes_on_bit_for_bit(optimizer_name: str, rounding: str) -> None:
    """Ten steps, or five, a file and five more: the same weights and the same state."""
    of = recipe(optimizer=optimizer_name, bf16_rounding=rounding)
    whole, first, second = network(), network(), network()
    through = build_optimizer(whole, of)
    step_with(whole, through, *range(10))
    stopped = build_optimizer(first, of)
    step_with(first, stopped, *range(5))
    with torch.no_grad():
        for parameter, value in zip(second.parameters(), weights(first), strict=True):
            parameter.copy_(value)
    resumed = build_optimizer(second, of)
    load_optimizer_state(resumed, saved_and_read(stopped.state_dict()), of)
    step_with(second, resumed, *range(5, 10))
    assert all(map(torch.equal, weights(second), weights(whole)))
    states = saved_and_read(through.state_dict()), saved_and_read(resumed.state_dict())
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_random_numbers_are_of_the_seed_and_the_step() -> None:
    """Torch's own random state plays no part; another seed rounds otherwise, and so does a step."""

    def end(seed: int, torch_seed: int) -> list[Tensor]:
        model = network()
        optimizer = build_optimizer(model, recipe(seed=seed))
        torch.manual_seed(torch_seed)
        before = torch.get_rng_state()
        step_with(model, optimizer, 0, 0)
        assert torch.equal(torch.get_rng_state(), before)
        return weights(model)

    assert all(map(torch.equal, end(0, 1), end(0, 2)))
    assert not any(map(torch.equal, end(0, 1), end(1, 1)))
    noise = [torch.empty(1000, dtype=torch.bfloat16) for _ in range(2)]
    model = nn.Linear(1000, 1, bias=False, dtype=torch.bfloat16)
    optimizer = build_optimizer(model, recipe(learning_rate=1e-3, weight_decay=0.0))
    for out in noise:
        nn.init.ones_(model.weight)
        optimizer.state.clear()
        step_with(model, optimizer, 0)
        out.copy_(model.weight.detach()[0])
    assert not torch.equal(*noise)


@pytest.mark.parametrize("optimizer_name", ["adamw", "adamw_8bit", "adafactor"])
def test_a_state_goes_on_in_the_other_precision(optimizer_name: str) -> None:
    """From fp32 weights to bf16 ones and back: the moments stay, and nothing is left behind."""
    fp32, bf16 = (
        recipe(optimizer=optimizer_name, mixed_precision="no"),
        recipe(optimizer=optimizer_name, bf16_rounding="kahan"),
    )
    exact = network(torch.float32)
    reference = build_optimizer(exact, fp32)
    step_with(exact, reference, *range(5))
    ours = network(torch.float32)
    with torch.no_grad():
        for parameter, value in zip(ours.parameters(), weights(exact), strict=True):
            parameter.copy_(value)
    optimizer = build_optimizer(ours.bfloat16(), bf16)
    load_optimizer_state(optimizer, saved_and_read(reference.state_dict()), bf16)
    before = weights(exact)
    step_with(exact, reference, 5)
    step_with(ours, optimizer, 5)
    for start, one, two in zip(before, exact.parameters(), ours.parameters(), strict=True):
        whole = two.float() + optimizer.state[two]["compensation"].float()
        assert (whole - one).norm() < 0.1 * (one - start).norm() + 2**-9 * start.norm()

    back = build_optimizer(exact, fp32)
    load_optimizer_state(back, saved_and_read(optimizer.state_dict()), fp32)
    for parameter in exact.parameters():
        mine, known = back.state[parameter], reference.state[parameter]
        assert mine.keys() == known.keys()
        for key, value in known.items():
            if isinstance(value, Tensor):
                assert (mine[key].dtype, mine[key].shape) == (value.dtype, value.shape), key
    step_with(exact, back, 6)


class _Fp32Bytes(TorchDispatchMode):
    """The most bytes of fp32 tensors over 1,000 elements that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if not isinstance(tensor, Tensor) or tensor.numel() <= 1000:
                continue
            storage = tensor.untyped_storage()
            if tensor.element_size() < 4 or storage._cdata in self._seen:
                continue
            self._seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, data: int, num_bytes: int) -> None:
        self._seen.discard(data)
        self.now -= num_bytes


@pytest.mark.parametrize(
    ("optimizer_name", "bytes_per_element"), [("adamw", 16), ("adamw_8bit", 8)]
)
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_of_fp32_there_is_one_parameter_at_a_time(
    optimizer_name: str, bytes_per_element: int, rounding: str
) -> None:
    """Weight, gradient and moments of the largest parameter, and after the step nothing."""
    model = nn.Sequential(*(nn.Linear(100, size, bias=False) for size in (100, 300, 100)))
    optimizer = build_optimizer(
        model.bfloat16(), recipe(optimizer=optimizer_name, bf16_rounding=rounding)
    )
    step_with(model, optimizer, 0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with _Fp32Bytes() as fp32:
        optimizer.step()
    assert fp32.most == bytes_per_element * 30_000
    assert fp32.now == 0


@pytest.mark.parametrize("optimizer_name", ["adamw", "adamw_8bit", "adafactor"])
@pytest.mark.parametrize(
    "changes",
    [{"mixed_precision": "no"}, {}, {"bf16_rounding": "kahan"}],
    ids=["fp32", "stochastic", "kahan"],
)
def test_the_state_takes_what_the_catalog_says(
    optimizer_name: str, changes: dict[str, Any]
) -> None:
    """The bytes kept for the weights of a real model, counted tensor by tensor."""
    of = recipe(optimizer=optimizer_name, **changes)
    model = build_model(of, vocab_size=1000, eos_token_id=0)
    optimizer = build_optimizer(model, of)
    step_with(model, optimizer, 0)
    shared = {"step", "qmap1", "qmap2"}  # numbers, and one table for all
    kept = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and key not in shared
    )
    row = OPTIMIZERS[of.optimizer]
    bf16 = of.mixed_precision == "pure_bf16"
    expected = sum(row.state_bytes(x.shape, bf16=bf16) for x in model.parameters())
    if of.bf16_rounding == "kahan":
        expected += 2 * sum(parameter.numel() for parameter in model.parameters())
    assert kept == expected == optimizer_state_bytes(model.parameters(), of)


def test_buffers_and_what_is_not_of_the_model_stay_fp32() -> None:
    """Weights become bf16 and stay tied; a hybrid's own scale and prior do not."""
    model = build_model(
        recipe(objective="hybrid"),
        vocab_size=300,
        eos_token_id=0,
        class_names=["a", "b"],
        log_prior=np.log([0.5, 0.5]),
    )
    kinds = {
        name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    assert kinds.pop("log_scale") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    assert model.log_prior.dtype == torch.float64
    for final in model.finals:
        base = final.transformers_model
        assert base.lm_head.weight is base.transformer.wte.weight
        base.register_buffer("frequencies", torch.ones(3))
    cast_to_bf16(model)
    assert model.finals[0].transformers_model.frequencies.dtype == torch.float32


def test_bf16_weights_learn_what_fp32_ones_learn(tmp_path: Path) -> None:
    """150 steps on text with a pattern: within 1% of fp32's loss; rounded to nearest, far from it.

    The model computes in fp32 on a copy of its bf16 weights, since CPUs are slow in bf16. Weights
    are as large beside the learning rate as a trained GPT-2's.
    """
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=32, initializer_range=0.2)
    config.save_pretrained(tmp_path)
    exact = recipe(
        model=str(tmp_path), max_length=25, mixed_precision="no", learning_rate=3e-4, dropout=0.0
    )
    start = build_model(exact, vocab_size=64, eos_token_id=0)
    random = np.random.default_rng(0)
    # Each token is the one before it plus 1 or 2.
    texts = np.cumsum(random.integers(1, 3, (150, 16, 25)), axis=2) % 64
    positions = torch.arange(16 * 24)

    def last_losses(of: TrainRecipe, *, in_bf16: bool) -> float:
        stored, computing = copy.deepcopy(start), copy.deepcopy(start)
        if in_bf16:
            cast_to_bf16(stored)
        optimizer = build_optimizer(stored, of)
        pairs = list(zip(stored.parameters(), computing.parameters(), strict=True))
        losses = []
        for batch in torch.from_numpy(texts):
            with torch.no_grad():
                for mine, copied in pairs:
                    copied.copy_(mine)
            loss = computing(batch[:, :-1], batch[:, 1:].flatten(), positions) / len(positions)
            loss.backward()
            for mine, copied in pairs:
                mine.grad, copied.grad = copied.grad.to(mine.dtype), None
            optimizer.step()
            losses.append(loss.item())
        return float(np.mean(losses[-20:]))

    fp32 = last_losses(exact, in_bf16=False)
    assert fp32 < 2.5 < math.log(64)
    assert last_losses(exact, in_bf16=True) > 1.2 * fp32
    for optimizer, rounding in ALL[:4]:  # AdamW, its moments of 8 bits too
        ours = dataclasses.replace(
            exact, mixed_precision="pure_bf16", optimizer=optimizer, bf16_rounding=rounding
        )
        found = last_losses(ours, in_bf16=True)
        assert found == pytest.approx(fp32, rel=0.01), (optimizer, rounding)
