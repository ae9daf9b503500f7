"""Trainings of a tiny model that several tests compare, and what two of them have in common."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import GPT2Config

from accel_gpt2.classify.prepare import PreparedData, prepare_data
from accel_gpt2.recipe import Layer, ResolvedRecipe
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train.checkpoint import Checkpoint, list_checkpoints, read_checkpoint
from tests.conftest import write_texts

from .harness import run
from .trainings import train

RTOL = 1e-5


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "checkpointed": {"gradient_checkpointing": True},
    "clipped": {"max_grad_norm": 0.01},
    "lora": {"finetuning": "lora", "learning_rate": 1e-3},
    "lora checkpointed": {"finetuning": "lora", "gradient_checkpointing": True},
}


class Runs:
    """Trainings of a model of two blocks on 25 documents, those of one process once each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_texts(folder / "texts.csv", documents_per_class=19, num_classes=2)
        GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64).save_pretrained(folder / "shape")

    def recipe(self, variant: str, **changes: Any) -> ResolvedRecipe:
        """One model of all text, so that a run takes as short as it can."""
        values: dict[str, Any] = {
            "objective": "unconditional",
            "model": str(self.folder / "shape"),
            "init": "scratch",
            "tokenizer": "train",
            "dataset": str(self.folder / "texts.csv"),
            "tokenizer_vocab_size": 300,
            "max_length": 48,
            "global_batch_size": 4,
            "micro_batch_tokens": 48,
            "epochs": 1.0,
            "warmup_fraction": 0.1,
            "log_every_steps": 1,
            "trackers": [],
            # Dropout draws other numbers for other shapes. AdamW makes a whole step of a gradient
            # that is nothing but rounding, where epsilon is as small as that.
            "dropout": 0.0,
            "adam_epsilon": 1e-5,
        }
        if "lora" in variant:
            base = next(self.alone("full").glob("*/final"))
            values |= {"model": str(base), "init": "pretrained", "tokenizer": "auto"}
        layers = [Layer(origin="test", values={**values, **VARIANTS[variant], **changes})]
        return resolve(layers)

    def alone(self, variant: str) -> Path:
        """What one process has made of a variant."""
        directory = self.folder / f"single {variant}"
        if not directory.exists():
            run("single", 1, train, self.recipe(variant), directory)
        return directory

    def together(self, strategy: str, variant: str) -> Path:
        """What two processes have made of it."""
        directory = self.folder / f"{strategy} {variant}"
        if not directory.exists():
            run(strategy, 2, train, self.recipe(variant), directory)
        return directory


def assert_alike(found: Path, expected: Path, *, rtol: float = RTOL) -> None:
    """Two runs went the same way up to rounding, or bit for bit."""
    steps, expected_steps = (steps_of(directory) for directory in (found, expected))
    assert len(steps) == len(expected_steps) > 5
    np.testing.assert_allclose(steps, expected_steps, rtol=rtol)
    scores = sorted(expected.glob("*/validation_scores/*.npy"))
    finals = sorted(expected.glob("*/final/*.safetensors"))
    assert (len(scores), len(finals)) == (1, 1)
    for path in scores:
        own = np.load(found / path.relative_to(expected))
        np.testing.assert_allclose(own, np.load(path), rtol=rtol)
    for path in finals:
        own, theirs = load_file(found / path.relative_to(expected)), load_file(path)
        assert own.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(own[name], tensor, rtol=rtol, atol=rtol)


def steps_of(directory: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, the last row where there are several."""
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    steps = {row["step"]: row for row in rows if row["event"] == "step"}
    return [(steps[step]["loss"], steps[step]["grad_norm"]) for step in sorted(steps)]


def data_of(runs: Runs) -> PreparedData:
    return prepare_data(runs.recipe("full").recipe, progress=False)


def checkpoint_of(directory: Path) -> Checkpoint:
    (newest,) = list_checkpoints(next(directory.glob("class-*")))
    return read_checkpoint(newest)
