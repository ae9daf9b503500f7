"""What our loop costs the host beside a plain one: Accelerate, batches made ahead, books, logs.

    python benchmarks/host_overhead.py [--rounds 30] [--output docs/benchmarks]

Two models of the same weights train on the same batches in one process, a few steps of one and a
few of the other in turn: one by `train.loop` under Accelerate, one by eight lines of torch. What is
compared are CPU seconds, of all threads, in rounds of both; the median of their ratios is given,
and the weights of both must be equal afterwards. A minute or two, on one core.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from one_training import optimizer_steps

from accel_gpt2.data.batching import split_micro_batches
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import to_device
from accel_gpt2.train.optim import build_optimizer, learning_rate_at
from accel_gpt2.train.schedule import BatchSchedule

MOST_OVERHEAD = 0.02
_STEPS_OF_A_TURN = 5
_TOTAL_STEPS = 10**5


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model and its steps."""

    name: str
    model: str
    vocab_size: int
    step_tokens: int


SIZES = (
    Size(name="short steps", model="gpt2-tiny", vocab_size=4096, step_tokens=512),
    Size(name="longer ones", model="gpt2-mini", vocab_size=50257, step_tokens=512),
)


def main() -> int:
    """Measure, write the page, and say whether the bar is held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    held = True
    for size in SIZES:
        ours, plain = compare(size, options.rounds)
        ratios = sorted(mine / its for mine, its in zip(ours, plain, strict=True))
        overhead = statistics.median(ratios) - 1
        quarter = len(ratios) // 4
        step_seconds = statistics.median(plain) / _STEPS_OF_A_TURN
        held &= overhead <= MOST_OVERHEAD
        lines.append(
            f"| {size.name}: {size.model}, {size.vocab_size:,} words, {size.step_tokens} tokens | "
            f"{1000 * step_seconds:.1f} | {1000 * overhead * step_seconds:+.2f} | {overhead:+.1%} "
            f"({ratios[quarter] - 1:+.1%} to {ratios[-1 - quarter] - 1:+.1%}) |"
        )
        sys.stdout.write(lines[-1] + "\n")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{time.strftime('%Y-%m-%d')}-host-overhead.md"
    page = [
        "# What the loop costs the host",
        "",
        f"`python benchmarks/host_overhead.py --rounds {options.rounds}`, torch "
        f"{torch.__version__}, {platform.platform()}, one thread. CPU seconds of {_STEPS_OF_A_TURN}"
        f" steps of our loop and of a plain one in turn, {options.rounds} rounds, median of the "
        "ratios and the middle half of them; the weights are equal afterwards.",
        "",
        f"Bar: at most {MOST_OVERHEAD:.0%}. {'Held.' if held else '**Missed.**'}",
        "",
        "| | plain step, ms | ours, ms more | |",
        "|---|---:|---:|---:|",
        *lines,
        "",
    ]
    path.write_text("\n".join(page), "utf-8")
    sys.stdout.write(f"wrote {path}\n")
    return 0 if held else 1


def compare(size: Size, rounds: int) -> tuple[list[float], list[float]]:
    """CPU seconds of each turn, ours and the plain loop's."""
    recipe = TrainRecipe(
        model=size.model,
        init="scratch",
        dropout=0.0,
        max_length=129,
        global_batch_tokens=size.step_tokens,
        micro_batch_tokens=size.step_tokens,
        evaluate_every_steps=_TOTAL_STEPS,
        trackers=(),
    )
    documents = _documents(size, steps=_STEPS_OF_A_TURN * (rounds + 3))
    models = [_language_model(recipe, size) for _ in range(2)]
    turns: tuple[list[float], list[float]] = ([], [])
    schedule = BatchSchedule(documents.lengths, recipe, total_steps=_TOTAL_STEPS)
    with optimizer_steps(models[0], documents, recipe, schedule=schedule) as ours:
        steppers = (ours, _plain(models[1], documents, recipe))
        for number in range(rounds + 2):
            for stepper, seconds in zip(steppers, turns, strict=True):
                started = time.process_time()
                for _ in range(_STEPS_OF_A_TURN):
                    next(stepper)
                if number >= 2:  # before that memory is taken
                    seconds.append(time.process_time() - started)
    for (name, mine), its in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6, msg=name)
    return turns


def _language_model(recipe: TrainRecipe, size: Size) -> LanguageModel:
    model = build_model(recipe, vocab_size=size.vocab_size, eos_token_id=0).train()
    assert isinstance(model, LanguageModel)
    model.pack_rows(recipe, torch.device("cpu"))
    return model


def _documents(size: Size, *, steps: int) -> TokenizedDocuments:
    random = np.random.default_rng(0)
    number = steps * size.step_tokens // 40
    lengths = random.integers(20, 80, number)
    return TokenizedDocuments(
        tokens=random.integers(0, size.vocab_size, lengths.sum()).astype(np.uint16),
        offsets=np.concatenate(([0], np.cumsum(lengths[:-1]))).astype(np.int64),
        lengths=lengths.astype(np.int32),
        labels=np.zeros(number, dtype=np.int64),
        num_bytes=4 * lengths.astype(np.int64),
        rows=np.arange(number),
        truncated=np.zeros(number, dtype=np.bool_),
    )


def _plain(
    model: LanguageModel, documents: TokenizedDocuments, recipe: TrainRecipe
) -> Iterator[None]:
    """The same steps in plain torch: what anybody would write, with our batches and our model."""
    optimizer = build_optimizer(model, recipe)
    parameters = list(model.parameters())
    schedule = BatchSchedule(documents.lengths, recipe, total_steps=_TOTAL_STEPS)
    device = torch.device("cpu")
    read: Callable[[int], np.ndarray] = documents.document
    step = 0
    while True:
        for batch in schedule.epoch(step // len(schedule.epoch(0))):
            pieces = split_micro_batches(
                documents.lengths,
                batch,
                world_size=1,
                micro_batch_tokens=recipe.micro_batch_tokens,
                packed=model.packed,
            )
            num_targets = int((documents.lengths[batch] - 1).sum())
            for (piece,) in pieces:
                arrays = model.collate([read(int(i)) for i in piece], piece, epoch=0)
                (model(*to_device(arrays, device)) * (1 / num_targets)).backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, _TOTAL_STEPS, recipe)
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            yield


if __name__ == "__main__":
    sys.exit(main())
