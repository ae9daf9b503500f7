"""What each way of computing a training step gains: the same batches, variants in turn.

    python benchmarks/step_variants.py [--rounds 3] [--tokens 4096] [--mixed-precision no]

A GPT-2 of 4 layers x 256 (12 x 768 on a GPU) with the vocabulary of GPT-2 and random weights,
without dropout, on random tokens in documents of the lengths of AG News and of IMDB. All variants
make whole optimizer steps in one process, in an order that rotates, each round on another batch; a
ratio is of two steps of one round. That the losses are equal is checked on the first batch. Time
is CPU seconds of one thread, and on a GPU, which is used where there is one, seconds. Four minutes
on two quiet cores; the page goes to docs/benchmarks/.
"""

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from results import Page

from accel_gpt2.data.batching import Indices, epoch_batches, split_micro_batches
from accel_gpt2.plan.data import dataset_statistics
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.trace.step import autocast, training_step
from accel_gpt2.train import causal, loss
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import TrainedModel, to_device
from accel_gpt2.train.optim import build_optimizer
from accel_gpt2.train.tf32 import products_in_tf32

_VOCAB_SIZE = 50257
_DOCUMENTS = 4000
_EQUAL = 1e-5  # of the loss, relative; below it in fp32 alone
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _torchs_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    chunk_tokens: int,
) -> torch.Tensor:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions(batch_chunk_size=chunk_tokens)
    return F.linear_cross_entropy(
        hidden, weight, targets, linear_bias=bias, reduction="sum", options=options
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A way to make the same step: `recipe` and `patch` say what is not as by default."""

    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    patch: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


VARIANTS = (
    Variant(name="as it is"),
    Variant(name="padded rows", recipe={"packing": "off", "micro_batch_tokens": 2**20}),
    Variant(
        name="head at its full, odd width",
        patch=lambda: mock.patch.object(loss, "_ALIGNED_WORDS", 1),
    ),
    Variant(
        name="torch's `linear_cross_entropy`",
        patch=lambda: mock.patch.object(causal, "chunked_cross_entropy", _torchs_loss),
    ),
    Variant(name="128 rows of logits at once", recipe={"loss_chunk_tokens": 128}),
    Variant(name="2,048 rows of logits at once", recipe={"loss_chunk_tokens": 2048}),
    Variant(name="`gelu_new`", recipe={"fused_gelu": False}),
    Variant(name="fp32 without TF32", recipe={"tf32": False}),
)


def main() -> None:
    """Measure both data sets and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, in one micro batch")
    parser.add_argument("--mixed-precision", default="no")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = "step-variants" if _DEVICE.type == "cpu" else "step-variants-gpu"
    title = "Ways to compute a training step"
    page = Page(options.output, name, title, packages=("torch", "transformers"))
    for dataset in ("ag_news", "imdb"):
        _measure(dataset, options, page)


def _measure(dataset: str, options: argparse.Namespace, page: Page) -> None:
    recipe = TrainRecipe(
        init="scratch",
        dataset=dataset,
        objective="unconditional",
        dropout=0.0,
        mixed_precision=options.mixed_precision,
        global_batch_tokens=options.tokens,
        micro_batch_tokens=options.tokens,
    )
    lengths = _lengths(recipe)
    batches = epoch_batches(
        lengths, global_batch_tokens=options.tokens, global_batch_size=None, seed=0, epoch=0
    )
    variants = [x for x in VARIANTS if _DEVICE.type == "cuda" or "tf32" not in x.recipe]
    steps = {x.name: _step(x, recipe, lengths) for x in variants}
    losses = {name: step(batches[0])[1] for name, step in steps.items()}  # warms them up too
    first = losses[variants[0].name]
    worst = max(abs(x / first - 1) for x in losses.values())
    if options.mixed_precision == "no" and worst > _EQUAL:
        raise SystemExit(f"The losses of the first batch differ by {worst:.1e}: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds):
        turn = number % len(variants)
        for variant in (*variants[turn:], *variants[:turn]):
            seconds[variant.name].append(steps[variant.name](batches[1 + number])[0])
    tokens = [int((lengths[x] - 1).sum()) for x in batches[1 : 1 + options.rounds]]
    page.add(
        f"\n## Lengths of {dataset}\n\n{options.rounds} rounds, steps of {options.tokens:,} "
        f"document tokens on {_DEVICE.type}, `mixed_precision: {options.mixed_precision}`. Losses "
        f"differ by {worst:.0e} at most.\n\n"
        "| variant | document tokens/s | speed of the step as it is: 1 |\n|---|---|---|"
    )
    reference = seconds[variants[0].name]
    for name, own in seconds.items():
        rate = statistics.median(t / s for t, s in zip(tokens, own, strict=True))
        ratios = [r / s for r, s in zip(reference, own, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        page.add(f"| {name} | {rate:,.0f} | {statistics.median(ratios):.2f} ({spread}) |")


def _lengths(recipe: TrainRecipe) -> NDArray[np.int64]:
    """Of documents drawn from the catalog's histogram, BOS and EOS included."""
    tokens, counts = (np.array(x) for x in zip(*dataset_statistics(recipe).lengths, strict=True))
    random = np.random.default_rng(0)
    drawn = random.choice(tokens, size=_DOCUMENTS, p=counts / counts.sum())
    blurred = drawn * random.uniform(0.97, 1.03, size=_DOCUMENTS)
    return np.clip(np.round(blurred), 2, recipe.max_length - 1).astype(np.int64) + 1


def _step(
    variant: Variant, recipe: TrainRecipe, lengths: NDArray[np.int64]
) -> Callable[[Indices], tuple[float, float]]:
    """A function that trains on a batch and gives its seconds and its summed loss."""
    recipe = dataclasses.replace(recipe, **variant.recipe)
    model = _model(recipe)
    optimizer = build_optimizer(model, recipe)

    def step(batch: Indices) -> tuple[float, float]:
        random = np.random.default_rng(int(batch[0]))
        documents = {int(i): random.integers(1, _VOCAB_SIZE, lengths[i]) for i in np.sort(batch)}
        ((piece,),) = split_micro_batches(
            lengths,
            batch,
            world_size=1,
            micro_batch_tokens=recipe.micro_batch_tokens,
            packed=model.packed,
        )
        tokens = [documents[int(i)] for i in piece]
        tensors = to_device(model.collate(tokens, np.zeros(len(piece), np.int64), epoch=0), _DEVICE)
        with variant.patch():
            with torch.no_grad(), autocast(recipe, _DEVICE):
                summed = float(model(*tensors)) if not optimizer.state else float("nan")
            with products_in_tf32(recipe), _timed() as seconds:
                training_step(
                    model, optimizer, [lambda: tensors], recipe, num_targets=len(tensors[1])
                )
        return seconds[0], summed

    return step


def _model(recipe: TrainRecipe) -> TrainedModel:
    from transformers import GPT2Config

    sizes = {"n_layer": 12, "n_embd": 768, "n_head": 12}
    if _DEVICE.type == "cpu":
        sizes = {"n_layer": 4, "n_embd": 256, "n_head": 4}
    with tempfile.TemporaryDirectory() as directory:
        GPT2Config(**sizes).save_pretrained(directory)
        own = dataclasses.replace(recipe, model=directory)
        model = build_model(own, vocab_size=_VOCAB_SIZE, eos_token_id=_VOCAB_SIZE - 1)
    model.to(_DEVICE).train()
    model.pack_rows(recipe, _DEVICE)
    return model


@contextlib.contextmanager
def _timed() -> Iterator[list[float]]:
    found: list[float] = []
    clock = time.process_time if _DEVICE.type == "cpu" else _device_seconds
    started = clock()
    yield found
    found.append(clock() - started)


def _device_seconds() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
