"""Do bf16 weights learn what fp32 weights learn?

    python benchmarks/pure_bf16.py [--real] [--steps 500] [--parts tuning] [--optimizers adamw]

trains gpt2-tiny on docstrings, the same batches for every row: from random weights (scratch, 2e-3),
and on from there on another class's text at a fine-tuning's learning rate (tuning, 5e-5), where
updates are smallest beside their weights. Rows are the optimizers with fp32 weights, with bf16
weights as their library rounds them (to nearest), and with ours. CPUs compute in bf16 very slowly,
so the model computes in fp32 on a copy of its weights, and weights, gradients and moments are bf16;
with --real all is. Prints Markdown: held-out bits per token at the end, its difference from fp32's,
and the largest difference of the training loss from fp32's anywhere on the way, averaged over 50
steps.
"""

import argparse
import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from results import say

from accel_gpt2.classify.prepare import prepare_data
from accel_gpt2.data.batching import collate
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.recipe import Layer, TrainRecipe
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train.bf16 import cast_to_bf16
from accel_gpt2.train.causal import LanguageModel, arrays
from accel_gpt2.train.model import build_model
from accel_gpt2.train.optim import build_optimizer, learning_rate_at
from accel_gpt2.train.schedule import BatchSchedule

OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor")
ROUNDINGS = ("fp32", "nearest", "stochastic", "kahan")
PARTS = ("scratch", "tuning")
WINDOW = 50  # steps that a loss is averaged over
SETTINGS = {
    "model": "gpt2-tiny",
    "dataset": "docstrings",
    "tokenizer_vocab_size": 1024,
    "max_length": 64,
    "global_batch_tokens": 256,
    "epochs": 100.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--real", action="store_true", help="the model computes in bf16 too")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    options = parser.parse_args()
    values = {**SETTINGS, "max_steps": options.steps}
    recipe = resolve([Layer(origin="benchmark", values=values)]).recipe
    data = prepare_data(recipe, progress=False)
    model = build_model(
        recipe, vocab_size=data.tokenizer.vocab_size, eos_token_id=data.tokenizer.eos_token_id
    )
    assert isinstance(model, LanguageModel)
    scratch = dataclasses.replace(recipe, learning_rate=2e-3)
    tuning = dataclasses.replace(recipe, learning_rate=5e-5)
    for part in options.parts:
        of, label = (scratch, 0) if part == "scratch" else (tuning, 1)
        start = model
        if part == "tuning":
            _, start = _train(model, _of_class(data.train, 0), scratch, "fp32", options)
        say(f"\n{part}\n\n| optimizer | weights | held-out | difference | on the way |")
        say("|---|---|---|---|---|")
        for optimizer in options.optimizers:
            reference: Curve | None = None
            for rounding in ROUNDINGS:
                changes = _changes(optimizer, rounding)
                losses, ended = _train(
                    start,
                    _of_class(data.train, label),
                    dataclasses.replace(of, **changes),
                    rounding,
                    options,
                )
                bits = _bits_per_token(ended, _of_class(data.validation, label))
                curve = Curve(losses=losses, held_out_bits=bits)
                reference = reference or curve
                end, way = curve.differences(reference)
                say(f"| {optimizer} | {rounding} | {bits:.4f} | {end:+.2%} | {way:.2%} |")


def _of_class(documents: TokenizedDocuments, label: int) -> TokenizedDocuments:
    return documents.select(documents.for_class(label))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Losses of all steps in nats per token, and bits per held-out token at the end."""

    losses: Sequence[float]
    held_out_bits: float

    def differences(self, reference: "Curve") -> tuple[float, float]:
        """Relative: at the end on held-out text, and the largest of the smoothed training loss."""
        mine, theirs = (
            np.convolve(x.losses, np.full(WINDOW, 1 / WINDOW), mode="valid")
            for x in (self, reference)
        )
        end = self.held_out_bits / reference.held_out_bits - 1
        return end, float(np.abs(mine / theirs - 1).max())


def _changes(optimizer: str, rounding: str) -> dict[str, Any]:
    ours = rounding in {"stochastic", "kahan"}
    return {
        "optimizer": optimizer,
        "mixed_precision": "pure_bf16" if ours else "no",
        "bf16_rounding": rounding if ours else "stochastic",
    }


def _train(
    start: LanguageModel,
    train: TokenizedDocuments,
    recipe: TrainRecipe,
    rounding: str,
    options: argparse.Namespace,
) -> tuple[list[float], LanguageModel]:
    stored = copy.deepcopy(start).train()
    if rounding != "fp32":
        cast_to_bf16(stored)
    computing = stored if rounding == "fp32" or options.real else copy.deepcopy(start).train()
    optimizer = build_optimizer(stored, recipe)
    schedule = BatchSchedule(train.lengths, recipe)
    pairs = list(zip(stored.parameters(), computing.parameters(), strict=True))
    losses = []
    epoch = number = 0
    for step in range(options.steps):
        batch = [train.document(int(i)) for i in schedule.epoch(epoch)[number]]
        number += 1
        if number == len(schedule.epoch(epoch)):
            epoch, number = epoch + 1, 0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, options.steps, recipe)
        if computing is not stored:
            with torch.no_grad():
                for mine, copied in pairs:
                    copied.copy_(mine)
        tensors = [torch.from_numpy(array) for array in arrays(collate(batch))]
        loss = computing(*tensors) / sum(len(document) - 1 for document in batch)
        loss.backward()
        if computing is not stored:
            for mine, copied in pairs:
                assert copied.grad is not None
                mine.grad, copied.grad = copied.grad.bfloat16(), None
        torch.nn.utils.clip_grad_norm_(stored.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, stored.float()


def _bits_per_token(model: LanguageModel, documents: TokenizedDocuments) -> float:
    """What the weights have learnt, whatever they were computed with."""
    first = [documents.document(index) for index in range(min(200, len(documents.lengths)))]
    nats = -model.eval().score(first, torch.device("cpu")).sum().item()
    return nats / math.log(2) / sum(len(document) - 1 for document in first)


if __name__ == "__main__":
    main()
