"""All classes' adapters on one base against one class after another: speed, memory, scoring.

    OMP_NUM_THREADS=1 python benchmarks/shared_base.py

trains LoRA adapters of four classes on random GPT-2s of several shapes, on random documents, in
three ways: the steps of one class after those of another, micro batches in turn, and stacked. The
ways take turns in blocks of a few steps; printed are medians of each block's ratio to one class
after another. Then the tensors' bytes, as held and as planned, and what scoring four adapters takes
with the base read once or four times. Prints Markdown.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import say
from torch import Tensor

from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.plan.memory import plan_memory
from accel_gpt2.plan.placement import placed_device
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.backend import Backend, MicroBatch, build_backend
from accel_gpt2.train.model import build_model, load_base
from accel_gpt2.train.objective import TrainedModel, TransformersModel
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.shared_base import StackedModels, Turn, share_frozen

NUM_CLASSES = 4
VOCAB_SIZE = 4096  # or the head would be most of a small model's work
CPU = torch.device("cpu")

# (n_layer, n_head, n_embd), (documents, tokens) of a class's micro batch.
SHAPES = (
    ((2, 2, 128), (2, 32)),
    ((2, 2, 128), (8, 64)),
    ((4, 4, 256), (2, 32)),
    ((4, 4, 256), (8, 64)),
    ((12, 12, 768), (1, 32)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of each class, in each block")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bases = {shape: _save_base(Path(folder), shape) for shape in dict(SHAPES)}
        say(
            f"{NUM_CLASSES} adapters of rank 16, {torch.get_num_threads()} threads, "
            f"medians of {options.blocks} blocks\n\n"
            "| layers x width | micro batch | one after another, tokens/s | in turn | stacked |"
            "\n|---|---|---|---|---|"
        )
        for shape, batch in SHAPES:
            say(_speed(bases[shape], shape, batch, options.blocks, options.steps))
        say(
            "\n| layers x width | one model | four apart | on one base | planned for a class more "
            "| held by a class more |\n|---|---|---|---|---|---|"
        )
        for shape in bases:
            say(_memory(bases[shape], shape))
        say(
            "\n| layers x width | seconds, base read four times | once | bytes of four models, "
            "four bases | one |\n|---|---|---|---|---|"
        )
        for shape in bases:
            say(_scoring(bases[shape], shape))


def _recipe(model: Path | str, **changes: Any) -> TrainRecipe:
    values: dict[str, Any] = {
        "model": str(model),
        "finetuning": "lora",
        "dropout": 0.0,
        "max_length": 1024,
        **changes,
    }
    return TrainRecipe(**values)


def _save_base(folder: Path, shape: tuple[int, int, int]) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()

    n_layer, n_head, n_embd = shape
    path = folder / f"{n_layer}x{n_embd}"
    config = GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=VOCAB_SIZE)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def _build(recipe: TrainRecipe) -> TrainedModel:
    return build_model(recipe, vocab_size=VOCAB_SIZE, eos_token_id=0).train()


def _four(recipe: TrainRecipe) -> list[Backend]:
    first = _build(recipe)
    models = [first, *(share_frozen(first) for _ in range(NUM_CLASSES - 1))]
    return [build_backend(build_accelerator(recipe), model, recipe) for model in models]


def _micro_batch(
    backend: Backend, batch: tuple[int, int], random: np.random.Generator
) -> MicroBatch:
    """Documents of a quarter more or less than so many tokens."""
    documents, tokens = batch
    lengths = random.integers(tokens * 3 // 4, tokens * 5 // 4 + 1, documents)
    arrays = backend.plain_model.collate(
        [random.integers(0, VOCAB_SIZE, length) for length in lengths],
        np.zeros(documents, dtype=np.int64),
        epoch=0,
    )
    tensors = tuple(torch.from_numpy(array) for array in arrays)
    return MicroBatch(backend=backend, tensors=tensors, scale=1 / int(lengths.sum()), last=True)


def _step(backend: Backend) -> None:
    backend.clip_grad_norm(1.0)
    backend.step()
    backend.zero_grad()


def _speed(
    base: Path, shape: tuple[int, int, int], batch: tuple[int, int], blocks: int, steps: int
) -> str:
    recipe = _recipe(base)
    backends = _four(recipe)
    random = np.random.default_rng(0)
    rounds = [[_micro_batch(x, batch, random) for x in backends] for _ in range(steps)]
    stacked = StackedModels(
        [x.plain_model for x in backends], build_accelerator(recipe), micro_batch_tokens=1 << 20
    )
    turns = [Turn(CPU) for _ in backends]

    def after_another() -> None:
        for number, backend in enumerate(backends):
            for micro_batches in rounds:
                micro_batches[number].run()
                _step(backend)

    def in_turn() -> None:
        for micro_batches in rounds:
            for turn, micro_batch in zip(turns, micro_batches, strict=True):
                with turn:
                    micro_batch.run()
                    _step(micro_batch.backend)

    def together() -> None:
        for micro_batches in rounds:
            stacked.run(micro_batches)
            for turn, backend in zip(turns, backends, strict=True):
                with turn:
                    _step(backend)

    ways: list[Callable[[], None]] = [after_another, in_turn, together]
    seconds = [[_seconds(way) for way in ways] for _ in range(blocks + 1)][1:]
    ratios = [statistics.median(row[0] / row[way] for row in seconds) for way in (1, 2)]
    tokens = sum(int(x.tensors[2].sum()) for row in rounds for x in row)
    per_second = tokens / statistics.median(row[0] for row in seconds)
    return (
        f"| {shape[0]} x {shape[2]} | {batch[0]} x {batch[1]} | {per_second:,.0f} | "
        f"{ratios[0]:.2f}x | {ratios[1]:.2f}x |"
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _held_bytes(tensors: Sequence[Tensor]) -> int:
    """Each storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(backend: Backend) -> list[Tensor]:
    """Weights, buffers, gradients and moments."""
    model = backend.plain_model
    gradients = [x.grad for x in backend.parameters if x.grad is not None]
    states = (state.values() for state in backend.optimizer.state.values())
    moments = [x for x in itertools.chain(*states) if isinstance(x, Tensor)]
    return [*model.parameters(), *model.buffers(), *gradients, *moments]


def _memory(base: Path, shape: tuple[int, int, int]) -> str:
    recipe = _recipe(base)
    backends = _four(recipe)
    random = np.random.default_rng(0)
    for backend in backends:
        _micro_batch(backend, (1, 8), random).run()
        backend.step()  # the gradients stay
    one, two, four = (
        _held_bytes([x for backend in backends[:count] for x in _tensors(backend)])
        for count in (1, 2, NUM_CLASSES)
    )
    n_layer, n_head, n_embd = shape
    spec = ModelSpec(
        name=str(base),
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_positions=1024,
        vocab_size=VOCAB_SIZE,
        hub_id=None,
        source="this benchmark",
    )
    memory = plan_memory(
        recipe, spec, PROFILES["rtx4070ti"], STRATEGIES["single"], longest_tokens=1024
    )
    planned = [
        placed_device(memory, "shared-base", models_per_gpu=count).expected for count in (1, 2)
    ]
    return (
        f"| {n_layer} x {n_embd} | {_mib(one)} | {_mib(NUM_CLASSES * one)} | {_mib(four)} | "
        f"{_mib(planned[1] - planned[0])} | {_mib(two - one)} |"
    )


def _scoring(base: Path, shape: tuple[int, int, int]) -> str:
    from peft import PeftModel

    recipe = _recipe(base)
    with tempfile.TemporaryDirectory() as folder:
        model = _build(recipe)
        assert isinstance(model, TransformersModel)
        model.save_pretrained(Path(folder))
        del model

        def read_each_time() -> list[Any]:
            return [
                PeftModel.from_pretrained(load_base(recipe), folder) for _ in range(NUM_CLASSES)
            ]

        def read_once() -> list[Any]:
            shared = load_base(recipe)
            return [
                PeftModel.from_pretrained(share_frozen(shared), folder) for _ in range(NUM_CLASSES)
            ]

        seconds, held = [], []
        for way in (read_each_time, read_once):
            way()
            seconds.append(statistics.median(_seconds(way) for _ in range(3)))
            held.append(_held_bytes([p for m in way() for p in m.parameters()]))
    return (
        f"| {shape[0]} x {shape[2]} | {seconds[0]:.2f} | {seconds[1]:.2f} | {_mib(held[0])} | "
        f"{_mib(held[1])} |"
    )


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
