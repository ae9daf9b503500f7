"""Batches made ahead of the training, and outcomes read behind it."""

import itertools
import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.backend import Backend, PlainBackend
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.model import build_model
from accel_gpt2.train.prefetch import Awaited, ahead
from accel_gpt2.train.processes import build_accelerator


def test_items_are_made_before_they_are_asked_for_and_no_earlier() -> None:
    """While the first item is worked on the next two are made, by another thread, and not a third;
    order and items stay."""
    made: list[int] = []
    threads: set[int] = set()
    third = threading.Event()

    def items() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            threads.add(threading.get_ident())
            if number == 2:
                third.set()
            yield number

    found = ahead(items(), depth=2)
    assert next(found) == 0
    assert third.wait(timeout=30)
    assert made == [0, 1, 2]
    assert threads.isdisjoint({threading.get_ident()})
    assert [next(found) for _ in range(5)] == [1, 2, 3, 4, 5]


def test_what_goes_wrong_ahead_is_raised_in_its_place() -> None:
    """Items before the failing one still come, and the exception is the generator's own."""

    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("document 7")

    found = ahead(items())
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(KeyError, match="document 7"):
        next(found)


def test_the_thread_ends_with_whom_it_works_for() -> None:
    """Closed in the middle, or forgotten, the iterator leaves no thread behind."""
    before = set(threading.enumerate())
    closed, forgotten, finished = (ahead(iter(range(10))) for _ in range(3))
    assert next(closed) == next(forgotten) == next(finished) == 0
    threads = set(threading.enumerate()) - before
    assert len(threads) == 3
    closed.close()  # type: ignore[attr-defined]
    del forgotten
    assert list(finished) == [*range(1, 10)]
    for thread in threads:
        assert thread.daemon
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_an_awaited_number_is_what_the_device_computed() -> None:
    """As float would give it, of a tensor and of a number."""
    assert Awaited(torch.tensor(2.5)).read() == Awaited(2.5).read() == 2.5


def _backend() -> PlainBackend:
    recipe = TrainRecipe(
        model="gpt2-tiny", init="scratch", max_length=18, dropout=0.0, learning_rate=1e-2
    )
    model = build_model(recipe, vocab_size=64, eos_token_id=0)
    backend = PlainBackend(build_accelerator(recipe), model, recipe)
    model.train()
    return backend


def _pass(backend: PlainBackend) -> None:
    tokens = np.random.default_rng(0).integers(0, 64, (4, 17))
    model = backend.plain_model
    assert isinstance(model, LanguageModel)
    batch = model.collate(list(tokens), np.zeros(4, dtype=np.int64), epoch=0)
    backend.run(tuple(map(torch.from_numpy, batch)), scale=1 / 64, last=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_device_itself_skips_a_step_that_is_not_finite(bad: float) -> None:
    """One gradient of one weight is bad: no weight, no moment and no count of steps changes, and
    the step after it is the one that would have come without it."""
    backends = [_backend(), _backend()]
    for backend in backends:
        _pass(backend)
        assert math.isfinite(backend.update(1.0).read())
    skipping, plain = backends
    weights = {name: x.clone() for name, x in skipping.gathered_weights().items()}
    state = {
        (number, key): value.clone()
        for number, own in skipping.gathered_optimizer_state()["state"].items()
        for key, value in own.items()
    }
    _pass(skipping)
    assert skipping.parameters[3].grad is not None
    skipping.parameters[3].grad.view(-1)[5] = bad
    assert not math.isfinite(skipping.update(1.0).read())
    for name, after in skipping.gathered_weights().items():
        assert torch.equal(after, weights[name]), name
    for number, own in skipping.gathered_optimizer_state()["state"].items():
        for key, after in own.items():
            assert torch.equal(after, state[number, key]), (number, key)
    for backend in backends:
        _pass(backend)
        backend.update(1.0)
    mine, its = skipping.gathered_weights(), plain.gathered_weights()
    assert all(torch.equal(mine[name], its[name]) for name in its)
    assert not all(torch.equal(mine[name], weights[name]) for name in its)


def test_update_on_the_device_equals_the_one_that_waits() -> None:
    """Three clipped steps give the same weights and norms, bit for bit."""
    on_device, waiting = _backend(), _backend()
    for _ in range(3):
        _pass(on_device)
        _pass(waiting)
        norm = on_device.update(0.1).read()
        assert norm == Backend.update(waiting, 0.1).read() > 0.1
    for name, weight in waiting.gathered_weights().items():
        assert torch.equal(on_device.gathered_weights()[name], weight), name
