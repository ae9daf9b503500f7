"""One of two gloo processes: train, evaluate, be stopped and fail, each on both processes together.

Started with the variables that torchrun sets. All scenarios share one start, because it takes
longer than they do. What each rank saw is left in `rank-<n>.json`.
"""

import dataclasses
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from accel_gpt2.classify.evaluate import evaluate_run
from accel_gpt2.classify.fit import fit
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.errors import StoppedEarly, UserError
from accel_gpt2.recipe import ResolvedRecipe
from accel_gpt2.recipe.layers import read_layer
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train.bf16 import Bf16Optimizer
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.model import load_final
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.scoring import score_documents
from accel_gpt2.train.stopping import StopRequest

RANK = int(os.environ.get("RANK", "0"))


def main(folder: Path) -> None:
    """Every scenario, in an order that both ranks keep."""
    gc.freeze()  # what the imports made is no garbage, and looking through it takes long
    full = resolve([read_layer(folder / "full.yaml")])
    lora = resolve([read_layer(folder / "lora.yaml")])
    bf16 = resolve([read_layer(folder / "bf16.yaml")])
    seen: dict[str, object] = {}
    with bf16_weights_noted() as seen["weights"]:
        for path in sorted(folder.glob("*.yaml")):
            name, recipe = path.stem, resolve([read_layer(path)])
            fit(recipe, folder / f"two-{name}", quiet=True)
            evaluate_run(folder / f"two-{name}", quiet=True)
    seen["scores"] = fewer_documents_than_processes(full, folder / "two-full").tolist()

    # In the middle of an epoch and at its end; both recipes accumulate.
    for name, recipe, number in (
        ("full", full, 4),
        ("full", full, 8),
        ("lora", lora, 4),
        ("lora", lora, 8),
        ("bf16", bf16, 4),
    ):
        run = folder / f"two-{name}-stopped-{number}"
        seen[run.name] = stopped_at_question(number, recipe, run)
        fit(recipe, run, quiet=True)

    # Another number of processes: one goes on from what two have written, and the reverse.
    seen["to-one"] = stopped_at_question(4, full, folder / "two-to-one")
    with documents_noted() as documents:
        fit(full, folder / "one-to-two", quiet=True)
    seen["documents"] = documents

    larger = dataclasses.replace(full.recipe, micro_batch_tokens=128)
    with out_of_memory(60, rank=1):
        fit(dataclasses.replace(full, recipe=larger), folder / "two-memory", quiet=True)
    with nan_in_training(4, rank=1):
        try:
            fit(full, folder / "two-nan", quiet=True)
        except UserError as error:
            seen["nan"] = str(error)

    with disk_full_on_the_first_process():
        try:
            fit(full, folder / "two-disk", quiet=True)
        except UserError as error:
            seen["disk"] = str(error)
    (folder / f"rank-{RANK}.json").write_text(json.dumps(seen))


def fewer_documents_than_processes(resolved: ResolvedRecipe, run: Path) -> np.ndarray:
    """One document, two processes: the same score on both."""

    class OneDocument:
        lengths = np.array([5])

        def document(self, index: int) -> np.ndarray:
            return np.array([0, 7, 8, 9, 0])

    model = load_final(next(run.glob("class-0-*/final")), resolved.recipe)
    accelerator = build_accelerator(resolved.recipe)
    return score_documents(model, OneDocument(), micro_batch_tokens=64, accelerator=accelerator)


def stopped_at_question(number: int, recipe: ResolvedRecipe, run: Path, *, rank: int = 1) -> int:
    """Train until a signal to one process at its `number`-th question; the exit code."""
    with signal_at_question(number, rank=rank):
        try:
            fit(recipe, run, quiet=True)
        except StoppedEarly as stopped:
            return int(stopped.exit_code)
    return 0


@contextmanager
def bf16_weights_noted() -> Iterator[list[str]]:
    """A digest of this process's weights after each step of an optimizer of bf16 weights."""
    step = Bf16Optimizer.step
    digests: list[str] = []

    def noting(self: Bf16Optimizer, closure: None = None) -> None:
        step(self)
        digest = hashlib.sha256()
        for group in self.param_groups:
            for parameter in group["params"]:
                digest.update(parameter.detach().view(torch.int16).numpy().tobytes())
        digests.append(digest.hexdigest())

    Bf16Optimizer.step = noting  # type: ignore[method-assign]
    yield digests
    Bf16Optimizer.step = step  # type: ignore[method-assign]


@contextmanager
def documents_noted() -> Iterator[list[int]]:
    """The rows of the split that this process reads for training, in order."""
    read = TokenizedDocuments.document
    rows: list[int] = []

    def noting(self: TokenizedDocuments, index: int) -> np.ndarray:
        if sys._getframe(1).f_code.co_filename.endswith("prefetch.py"):
            rows.append(int(self.rows[index]))
        return read(self, index)

    TokenizedDocuments.document = noting  # type: ignore[method-assign]
    yield rows
    TokenizedDocuments.document = read  # type: ignore[method-assign]


@contextmanager
def out_of_memory(limit_tokens: int, *, rank: int) -> Iterator[None]:
    """One process has less memory than the other."""
    forward = LanguageModel.forward

    def limited(self: LanguageModel, input_ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if rank == RANK and input_ids.numel() > limit_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, input_ids, *rest)

    LanguageModel.forward = limited  # type: ignore[method-assign]
    yield
    LanguageModel.forward = forward  # type: ignore[method-assign]


@contextmanager
def nan_in_training(calls: int, *, rank: int) -> Iterator[None]:
    """On one process every loss after the first `calls` is NaN."""
    forward = LanguageModel.forward
    seen = 0

    def broken(self: LanguageModel, *tensors: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        loss = forward(self, *tensors)
        return loss * float("nan") if rank == RANK and seen > calls else loss

    LanguageModel.forward = broken  # type: ignore[method-assign]
    yield
    LanguageModel.forward = forward  # type: ignore[method-assign]


@contextmanager
def signal_at_question(number: int, *, rank: int) -> Iterator[None]:
    """SIGTERM reaches one process only, when it asks for the `number`-th time whether to stop."""
    ask = StopRequest.requested
    asked = 0

    def counting(self: StopRequest, device: object) -> bool:
        nonlocal asked
        asked += 1
        if rank == RANK and asked == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, device)  # type: ignore[arg-type]

    StopRequest.requested = counting  # type: ignore[method-assign,assignment]
    yield
    StopRequest.requested = ask  # type: ignore[method-assign]


@contextmanager
def disk_full_on_the_first_process() -> Iterator[None]:
    """Only the process that writes sees that there is no room."""
    usage = shutil.disk_usage
    if RANK == 0:
        shutil.disk_usage = lambda path: usage(path)._replace(free=1000)  # type: ignore[assignment]
    yield
    shutil.disk_usage = usage


if __name__ == "__main__":
    main(Path(sys.argv[1]))
