"""Evaluation and saving need no more memory than training, measured by torch's own tracker."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.checkpoint import Identity, TrainState, save_checkpoint
from accel_gpt2.train.model import build_model
from accel_gpt2.train.optim import build_optimizer
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.scoring import score_documents

RECIPE = TrainRecipe(model="gpt2-tiny", init="scratch", max_length=256, loss_chunk_tokens=64)
LENGTH = 129
MICRO_BATCH_TOKENS = 1024


class Documents:
    """One full micro batch of equal documents; the tracker follows one pass."""

    lengths = np.full(MICRO_BATCH_TOKENS // (LENGTH - 1), LENGTH)

    def document(self, index: int) -> np.ndarray:
        return np.full(LENGTH, 7)


def _peak_bytes(work: Callable[[], object], *tracked: object) -> int:
    """The most that all tensors together held while `work` ran."""
    tracker = MemTracker()
    tracker.track_external(*tracked)
    with tracker:
        work()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return int(snapshot["Total"])


def test_evaluating_and_saving_stay_below_training(tmp_path: Path) -> None:
    """A training step with the optimizer's state in place sets the peak of a run."""
    model = build_model(RECIPE, vocab_size=16_000, eos_token_id=0)
    optimizer = build_optimizer(model, RECIPE)
    accelerator = build_accelerator(RECIPE)
    ids = torch.full((MICRO_BATCH_TOKENS // (LENGTH - 1), LENGTH - 1), 7)

    def train() -> None:
        model(ids, ids.flatten(), torch.arange(ids.numel(), device=ids.device)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def evaluate() -> None:
        score_documents(
            model, Documents(), micro_batch_tokens=MICRO_BATCH_TOKENS, accelerator=accelerator
        )

    def save() -> None:
        save_checkpoint(
            tmp_path,
            state=TrainState(step=1),
            identity=Identity(
                class_index=0,
                class_name="a",
                data_fingerprint="d",
                tokenizer_fingerprint="t",
                recipe={},
            ),
            weights=model.trainable_state(),
            optimizer={"optimizer": optimizer.state_dict(), "scaler": None},
            random_states=[{"cpu": torch.get_rng_state()}],
        )

    train()
    held = 12 * sum(parameter.numel() for parameter in model.parameters())
    training = _peak_bytes(train, model, optimizer)
    assert training > held
    assert _peak_bytes(evaluate, model, optimizer) <= training
    assert held <= _peak_bytes(save, model, optimizer) < 1.01 * held
