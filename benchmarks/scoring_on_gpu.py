"""Scores on a GPU beside what a person would run, and with the head multiplied in two ways.

    python benchmarks/scoring_on_gpu.py [--seconds 120] [--output docs/benchmarks]
    python benchmarks/scoring_on_gpu.py --device cpu --sizes tiny     # a rehearsal without a GPU

log p(document) under random GPT-2s in bf16 autocast, random tokens at the lengths of AG News and
IMDB. Ours by fp16 halves and in fp32 have the same blocks, so that their scores differ by the
head's product alone; one of the two is what `train` and `evaluate` take on this GPU. The naive loop
has one document at a time, `model(ids, labels=ids)`. It needs no network, stops in time and writes
after every row; a bare machine wants what gpu_options.py says.

Exit code 1 where the halves' scores are not those of fp32, or not ahead where they are taken.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_options import gpu_options, is_there
from numpy.typing import NDArray
from results import Page, say
from token_documents import Documents

from accel_gpt2.catalog.datasets import DATASETS
from accel_gpt2.catalog.models import MODELS
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train import loss
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.model import build_model
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.scoring import score_documents
from accel_gpt2.units import MIB

_LARGEST_DIFFERENCE = 1e-6  # of a document's score, relative
_NAIVE_DOCUMENTS = 32
_LONGEST = 512


def main() -> int:
    """Write the page; the exit code."""
    options = gpu_options(__doc__, seconds=120.0).parse_args()
    if not is_there(options.device):
        return 1
    os.environ["ACCELERATE_USE_CPU"] = str(options.device == "cpu").lower()
    on_gpu = options.device == "cuda"
    device = torch.device(options.device)
    tiny = options.sizes == "tiny"
    recipe = TrainRecipe(mixed_precision="bf16" if on_gpu else "no", micro_batch_tokens=8192)
    accelerator = build_accelerator(recipe)
    page = Page(options.output, "scoring-on-gpu", "Scores on a GPU", packages=("torch",))
    taken = loss._multiplies_by_halves(accelerator.device)
    page.add(
        f"{torch.cuda.get_device_name() if on_gpu else 'a rehearsal on the CPU'}; here "
        f"{'fp16 halves are' if taken else 'fp32 is'} taken.\n\n| model | lengths | by halves, "
        "documents/s | in fp32 | naive loop | halves over fp32 | over naive | largest difference "
        "of a score | peak MiB, halves | fp32 |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    right = True
    ends = time.monotonic() + options.seconds
    for name in ("gpt2-tiny",) if tiny else ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        vocab_size = MODELS[name].vocab_size
        model = build_model(
            TrainRecipe(model=name, init="scratch", max_length=_LONGEST),
            vocab_size=vocab_size,
            eos_token_id=vocab_size - 1,
        )
        model.to(device).eval()
        for dataset in ("ag_news", "imdb"):
            if time.monotonic() > ends:
                page.add(f"\nLeft out, for want of time: {name} on {dataset}.")
                continue
            documents = _documents(dataset, 20 if tiny else 1000, vocab_size)
            naive, halves, in_fp32 = _row(model, documents, recipe.micro_batch_tokens, accelerator)
            off = float(np.abs(halves.scores / in_fp32.scores - 1).max())
            gain = halves.rate / in_fp32.rate
            right &= off < _LARGEST_DIFFERENCE and (gain > 1 or not taken)
            best = halves.rate if taken else in_fp32.rate
            page.add(
                f"| {name} | {dataset} | {halves.rate:,.0f} | {in_fp32.rate:,.0f} | "
                f"{naive.rate:,.1f} | {gain:.2f} | {best / naive.rate:.1f} | {off:.1e} | "
                f"{halves.peak_bytes / MIB:,.0f} | {in_fp32.peak_bytes / MIB:,.0f} |"
            )
        del model
        gc.collect()
    say(f"Written to {page.path}.")
    return 0 if right else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of the second of two passes; `peak_bytes` over what was held before it, 0 on a CPU."""

    scores: NDArray[np.float64]
    rate: float
    peak_bytes: int


def _row(
    model: LanguageModel, documents: Documents, micro_batch_tokens: int, accelerator: Any
) -> tuple[Measured, Measured, Measured]:
    """The naive loop, ours by halves, and ours in fp32."""
    device = accelerator.device
    some = documents.token_ids[:_NAIVE_DOCUMENTS]
    with torch.no_grad(), accelerator.autocast():
        naive = _measured(partial(_naive, model, some, device), len(some), device)
    ours = partial(
        score_documents,
        model,
        documents,
        micro_batch_tokens=micro_batch_tokens,
        accelerator=accelerator,
    )
    found = []
    for by_halves in (True, False):
        with _product(by_halves=by_halves):
            found.append(_measured(ours, len(documents.token_ids), device))
    return naive, *found


def _measured(score: Callable[[], Any], num_documents: int, device: torch.device) -> Measured:
    on_gpu = device.type == "cuda"
    score()
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    scores = np.asarray(score())  # on the host, so that nothing is still queued
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return Measured(scores=scores, rate=num_documents / seconds, peak_bytes=peak)


@contextmanager
def _product(*, by_halves: bool) -> Iterator[None]:
    """The head's product of scores, whatever this device would take."""
    before = loss._multiplies_by_halves
    loss._multiplies_by_halves = lambda device: by_halves  # type: ignore[assignment]
    try:
        yield
    finally:
        loss._multiplies_by_halves = before


def _naive(
    model: LanguageModel, documents: Sequence[NDArray[np.int64]], device: torch.device
) -> list[float]:
    scores = []
    for ids in documents:
        tokens = torch.from_numpy(ids)[None].to(device)
        scores.append(-model.transformers_model(tokens, labels=tokens).loss.item())
    return scores


def _documents(dataset: str, count: int, vocab_size: int) -> Documents:
    random = np.random.default_rng(0)
    values, weights = np.array(DATASETS[dataset].token_lengths).T
    lengths = np.minimum(random.choice(values, count, p=weights / weights.sum()), _LONGEST - 2)
    return Documents([random.integers(0, vocab_size, n + 2) for n in lengths])


if __name__ == "__main__":
    sys.exit(main())
