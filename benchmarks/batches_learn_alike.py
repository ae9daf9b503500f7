"""Do batches of documents of one length learn what batches of documents as they are drawn learn?

    python benchmarks/batches_learn_alike.py [--dataset ../shared/data/ag_news] [--steps 400]

trains a small GPT-2 on all of a data set's text by the loop that `train` runs, with the recipe's
own warm-up and schedule, from the same random weights and with the same budget of tokens in a step:
on our batches, on documents in the order in which they are drawn, which ours are but for the first
one, and on batches of neighbouring lengths. What is compared is the held-out loss in the end, seed
by seed. The padding that neighbouring lengths save where rows are padded is given too. Ten minutes
for each seed, on one core.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from one_training import optimizer_steps
from results import Page, say

from accel_gpt2.classify.prepare import PreparedData, prepare_data
from accel_gpt2.data.batching import Indices, split_micro_batches
from accel_gpt2.plan.cutting import cut_by_tokens
from accel_gpt2.recipe import Layer, TrainRecipe
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.model import build_model
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.schedule import BatchSchedule
from accel_gpt2.train.scoring import score_documents

LARGEST_DIFFERENCE = 0.005  # of the held-out loss from that of documents drawn at random, relative


class AsDrawn(BatchSchedule):
    """Documents in a random order, cut where the budget of tokens is used up."""

    def epoch(self, epoch: int) -> list[Indices]:
        """The global batches of an epoch, in order."""
        if epoch not in self._epochs:
            random = np.random.default_rng((self._recipe.seed, epoch))
            order = random.permutation(len(self._lengths))
            cuts = cut_by_tokens((self._lengths[order] - 1).tolist(), self._budget)
            self._epochs[epoch] = np.split(order, cuts[1:-1])
        return self._epochs[epoch]

    @property
    def _budget(self) -> int:
        assert self._recipe.global_batch_tokens is not None
        return self._recipe.global_batch_tokens


class OfOneLength(AsDrawn):
    """Neighbours by length among those of 64 batches, lengths blurred by a tenth; batches in a
    random order. So accel-gpt2 trained until 2026-11-30, the longest batch first."""

    longest_first = False

    def epoch(self, epoch: int) -> list[Indices]:
        """The global batches of an epoch, in order."""
        if epoch not in self._epochs:
            random = np.random.default_rng((self._recipe.seed, epoch))
            tokens = self._lengths.astype(np.int64) - 1
            order = random.permutation(len(tokens))
            pool_size = round(64 * max(1.0, self._budget / tokens.mean()))
            batches: list[Indices] = []
            for pool in np.split(order, range(pool_size, len(order), pool_size)):
                blur = random.uniform(0.9, 1.1, size=len(pool))
                pool = pool[np.argsort(tokens[pool] * blur, kind="stable")]
                batches += np.split(pool, cut_by_tokens(tokens[pool].tolist(), self._budget)[1:-1])
            found = [batches[i] for i in random.permutation(len(batches))]
            if self.longest_first and epoch == 0:
                longest = max(range(len(found)), key=lambda i: tokens[found[i]].max())
                found.insert(0, found.pop(longest))
            self._epochs[epoch] = found
        return self._epochs[epoch]


class OfOneLengthLongestFirst(OfOneLength):
    """The same, and the batch with the longest document comes first."""

    longest_first = True


REFERENCE = "documents as they are drawn"
SIDES: dict[str, type[BatchSchedule]] = {
    REFERENCE: AsDrawn,
    "accel-gpt2": BatchSchedule,
    "documents of one length": OfOneLength,
    "documents of one length, the longest first": OfOneLengthLongestFirst,
}


def main() -> int:
    """Train all sides with all seeds, write the page, and say whether the bar is held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="docstrings", help="name or path (default docstrings)")
    parser.add_argument("--model", default="gpt2-tiny")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--step-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = Path(options.dataset).stem
    page = Page(
        options.output,
        f"batches-learn-alike-{name.replace('_', '-')}",
        f"What batches of documents of one length learn: {name}",
        packages=("torch", "transformers"),
    )
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for seed in range(options.seeds):
        recipe = _recipe(options, seed)
        data = prepare_data(recipe, progress=False)
        if seed == 0:
            page.add(_what_is_trained(recipe, data, options.steps))
        for side, schedule in SIDES.items():
            found[side].append(_train(schedule, recipe, data, options.steps))
            say(f"seed {seed}, {side}: {found[side][-1][0]:.4f} bits/token")
    page.add(
        "\n| batches | document tokens of padded ones | bits/token held out, by seed | mean | "
        "from documents as they are drawn |\n|---|---|---|---|---|"
    )
    held = {side: _row(page, side, found) for side in SIDES}
    return 0 if held["accel-gpt2"] else 1


def _recipe(options: argparse.Namespace, seed: int) -> TrainRecipe:
    values: dict[str, Any] = {
        "dataset": options.dataset,
        "model": options.model,
        "init": "scratch",
        "objective": "unconditional",
        "max_length": options.max_length,
        "max_steps": options.steps,
        "global_batch_tokens": options.step_tokens,
        "epochs": 1000.0,
        "evaluate_every_steps": 10**6,
        "seed": seed,
        "trackers": (),
    }
    return resolve([Layer(origin="benchmark", values=values)]).recipe


def _what_is_trained(recipe: TrainRecipe, data: PreparedData, steps: int) -> str:
    lengths = data.train.lengths - 1
    return (
        f"{recipe.model} from random weights, {steps} steps of {recipe.global_batch_tokens:,} "
        f"tokens, learning rate {recipe.learning_rate:g}, warm-up {recipe.warmup_fraction:.0%}, "
        f"{recipe.lr_schedule} schedule; {len(lengths):,} documents of {lengths.mean():.0f} "
        f"tokens, the longest of {lengths.max():,}, a vocabulary of {data.tokenizer.vocab_size:,}; "
        f"{len(data.validation):,} documents held out."
    )


def _train(
    kind: type[BatchSchedule], recipe: TrainRecipe, data: PreparedData, steps: int
) -> tuple[float, float]:
    """Held-out bits per token in the end, and the share of document tokens in what was computed."""
    model = build_model(
        recipe, vocab_size=data.tokenizer.vocab_size, eos_token_id=data.tokenizer.eos_token_id
    )
    assert isinstance(model, LanguageModel)
    schedule = kind(data.train.lengths, recipe, total_steps=steps + 1)
    with optimizer_steps(model, data.train, recipe, schedule=schedule) as trained:
        for _ in range(steps):
            next(trained)
    model.eval()
    scores = score_documents(
        model,
        data.validation,
        micro_batch_tokens=recipe.micro_batch_tokens,
        accelerator=build_accelerator(recipe),
    )
    targets = int((data.validation.lengths - 1).sum())
    return -float(scores.sum()) / targets / np.log(2), _useful(schedule, recipe, data.train.lengths)


def _useful(schedule: BatchSchedule, recipe: TrainRecipe, lengths: NDArray[Any]) -> float:
    useful = computed = 0
    for batch in schedule.epoch(0):
        for (piece,) in split_micro_batches(
            lengths, batch, world_size=1, micro_batch_tokens=recipe.micro_batch_tokens
        ):
            predicted = lengths[piece] - 1
            useful += int(predicted.sum())
            computed += len(piece) * int(predicted.max())
    return useful / computed


def _row(page: Page, side: str, found: dict[str, list[tuple[float, float]]]) -> bool:
    bits = [loss for loss, _ in found[side]]
    differences = [
        mine / theirs - 1 for mine, (theirs, _) in zip(bits, found[REFERENCE], strict=True)
    ]
    useful = statistics.fmean(share for _, share in found[side])
    mean = statistics.fmean(differences)
    page.add(
        f"| {side} | {useful:.1%} | {', '.join(f'{x:.4f}' for x in bits)} | "
        f"{statistics.fmean(bits):.4f} | {mean:+.2%} ({min(differences):+.2%} to "
        f"{max(differences):+.2%}) |"
    )
    return mean <= LARGEST_DIFFERENCE


if __name__ == "__main__":
    sys.exit(main())
