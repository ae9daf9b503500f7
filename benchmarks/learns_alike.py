"""Does the recipe that fits GPT-2 XL on a 16 GB card learn what fp32 AdamW learns?

    python benchmarks/learns_alike.py [--steps 500] [--rows xl ...] [--output-dir DIR]

trains gpt2-tiny (or --model) on all of docstrings by the loop that `train` runs, from the same
random weights over the same batches: with fp32 AdamW, and with each recipe below, computing in its
own precision. Prints Markdown: validation bits per token at the end and their difference from
fp32's, and the largest difference of the training loss from fp32's anywhere on the way, both
averaged over 50 steps. Exit code 1 when a row is off by more than 1% anywhere. CPUs compute in bf16
very slowly: ten minutes.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results import say

from accel_gpt2.classify.fit import fit
from accel_gpt2.recipe import Layer
from accel_gpt2.recipe.resolving import resolve

WINDOW = 50  # steps that a loss is averaged over
LARGEST_DIFFERENCE = 0.01

SETTINGS: Mapping[str, Any] = {
    "dataset": "docstrings",
    "objective": "unconditional",
    "tokenizer": "train",
    "tokenizer_vocab_size": 1024,
    "init": "scratch",
    "max_length": 64,
    "global_batch_tokens": 256,
    "micro_batch_tokens": 512,  # a step is one micro batch, padding included
    "epochs": 100.0,
    "learning_rate": 2e-3,
    "dropout": 0.0,
    "log_every_steps": 1,
    "validation_documents": 200,
    "trackers": (),
}

_XL = {
    "mixed_precision": "pure_bf16",
    "optimizer": "adamw_8bit",
    "gradient_checkpointing": True,
}
_RELEASED = {"release_gradients": True, "max_grad_norm": 0.0}

# Each with what its fp32 reference shares with it.
ROWS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "xl": (_XL, {}),
    "xl, one block checkpointed": ({**_XL, "checkpointed_layers": 1}, {}),
    "xl, gradients released": ({**_XL, **_RELEASED}, {"max_grad_norm": 0.0}),
    "large: fp32 weights, 8-bit AdamW": ({"optimizer": "adamw_8bit"}, {}),
    "large: fp32 weights, paged AdamW": ({"optimizer": "adamw_paged"}, {}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Losses of all steps in nats per token, validation bits per token at the end, seconds."""

    losses: Sequence[float]
    validation_bits: float
    seconds: float

    def differences(self, reference: "Curve") -> tuple[float, float]:
        """Relative: at the end on validation text, and the largest of the smoothed training
        loss."""
        mine, theirs = (
            np.convolve(x.losses, np.full(WINDOW, 1 / WINDOW), mode="valid")
            for x in (self, reference)
        )
        end = self.validation_bits / reference.validation_bits - 1
        return end, float(np.abs(mine / theirs - 1).max())


def main() -> int:
    """Train all rows, print the table, and say whether the bar is held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-tiny")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--output-dir", type=Path, help="for the runs; left behind when given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return _table(options, options.output_dir or Path(temporary))


def _table(options: argparse.Namespace, directory: Path) -> int:
    settings = {**SETTINGS, "model": options.model, "max_steps": options.steps}
    references: dict[str, Curve] = {}
    largest = 0.0
    say("| recipe | validation | difference | on the way | seconds |")
    say("|---|---|---|---|---|")
    for name in options.rows:
        changes, shared = ROWS[name]
        key = "fp32 AdamW" + "".join(f", {k}={v:g}" for k, v in shared.items())
        if key not in references:
            curve = references[key] = _train({**settings, **shared}, directory / key)
            say(f"| {key} | {curve.validation_bits:.4f} | | | {curve.seconds:.0f} |")
        curve = _train({**settings, **changes}, directory / name)
        end, way = curve.differences(references[key])
        largest = max(largest, abs(end), way)
        say(
            f"| {name} | {curve.validation_bits:.4f} | {end:+.2%} | {way:.2%} | "
            f"{curve.seconds:.0f} |"
        )
    return 1 if largest > LARGEST_DIFFERENCE else 0


def _train(values: Mapping[str, Any], directory: Path) -> Curve:
    started = time.monotonic()
    fit(resolve([Layer(origin="benchmark", values=values)]), directory, quiet=True)
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text("utf-8").splitlines()]
    losses = [row["loss"] for row in rows if row["event"] == "step"]
    assert len(losses) == values["max_steps"], f"{len(losses)} losses in {directory}"
    bits = [row["validation_bits_per_token"] for row in rows if row["event"] == "evaluate"][-1]
    return Curve(losses=losses, validation_bits=bits, seconds=time.monotonic() - started)


if __name__ == "__main__":
    sys.exit(main())
