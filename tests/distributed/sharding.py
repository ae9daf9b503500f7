"""What the ranks of a test do with a sharded model itself, below a whole training."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from accel_gpt2.classify.evaluate import evaluate_run
from accel_gpt2.classify.fit import fit
from accel_gpt2.recipe import ResolvedRecipe, TrainRecipe
from accel_gpt2.train.backend import build_backend
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import to_device
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.scoring import score_documents


class Documents:
    """Documents of these lengths, made when they are asked for."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)

    def document(self, index: int) -> np.ndarray:
        return np.arange(self.lengths[index]) % 250 + 1


def held(recipe: TrainRecipe) -> dict[str, int]:
    """Elements that this rank holds of weights, of gradients between two micro batches, and of each
    of AdamW's moments."""
    accelerator = build_accelerator(recipe)
    model = build_model(recipe, vocab_size=300, eos_token_id=0)
    backend = build_backend(accelerator, model, recipe)
    documents = [Documents([20, 12]).document(index) for index in range(2)]
    arrays = model.collate(documents, np.zeros(2, dtype=np.int64), epoch=0)
    tensors = to_device(arrays, accelerator.device)
    found = {"weights": _elements(model.parameters())}
    backend.run(tensors, scale=1.0, last=False)
    found["gradients"] = _elements(x.grad for x in model.parameters() if x.grad is not None)
    backend.run(tensors, scale=1.0, last=True)
    backend.clip_grad_norm(1.0)
    backend.step()
    moments = [own["exp_avg"] for own in backend.optimizer.state.values()]
    return {**found, "moments": _elements(moments)}


def _elements(tensors: Any) -> int:
    return sum(x.to_local().numel() if hasattr(x, "to_local") else x.numel() for x in tensors)


def scores_of(
    recipe: TrainRecipe, lengths: list[int]
) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Scores by a model that is sharded where the strategy does that, and its weights, gathered as
    by a save that a signal asks for within an evaluation."""
    accelerator = build_accelerator(recipe)
    model = build_model(recipe, vocab_size=300, eos_token_id=0)
    backend = build_backend(accelerator, model, recipe)
    with backend.scoring():
        scores = score_documents(
            model, Documents(lengths), micro_batch_tokens=64, accelerator=accelerator
        )
        return scores, backend.gathered_weights()


def train_and_evaluate(resolved: ResolvedRecipe, run: Path) -> None:
    """What `launch/train.py` and `launch/evaluate.py` do, in the same processes."""
    fit(resolved, run, quiet=True)
    evaluate_run(run, quiet=True)


def train_with_less_memory(resolved: ResolvedRecipe, run: Path, *, tokens: int, rank: int) -> None:
    """One rank has no room for more than so many tokens, and finds out within a block."""
    forward = GPT2MLP.forward

    def limited(self: GPT2MLP, hidden_states: torch.Tensor) -> torch.Tensor:
        if int(os.environ["RANK"]) == rank and hidden_states.shape[:-1].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, hidden_states)

    GPT2MLP.forward = limited  # type: ignore[method-assign]
    fit(resolved, run, quiet=True)


def steps_with_an_overflow(recipe: TrainRecipe, rank: int) -> list[tuple[float, float, bool]]:
    """Three steps under fp16's loss scaler, where a gradient of one rank overflows in the second:
    the gradients' norm, the scale after the step, and whether this rank's weights changed."""
    from accelerate.optimizer import AcceleratedOptimizer

    accelerator = build_accelerator(recipe)
    model = build_model(recipe, vocab_size=300, eos_token_id=0)
    backend = build_backend(accelerator, model, recipe)
    accelerator.scaler = backend.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    backend.optimizer = AcceleratedOptimizer(
        backend.optimizer.optimizer, device_placement=False, scaler=backend.scaler
    )
    arrays = model.collate([Documents([20]).document(0)], np.zeros(1, dtype=np.int64), epoch=0)
    found = []
    for number in range(3):
        backend.run(to_device(arrays, accelerator.device), scale=1.0, last=True)
        if number == 1 and accelerator.process_index == rank:
            next(model.parameters()).grad.to_local()[0, 0] = math.inf
        norm = backend.clip_grad_norm(1.0)
        before = [parameter.clone() for parameter in backend.parameters]
        backend.step() if math.isfinite(norm) else backend.skip()
        backend.zero_grad()
        changed = any(
            not torch.equal(old, new) for old, new in zip(before, backend.parameters, strict=True)
        )
        found.append((norm, backend.scaler.get_scale(), changed))
    return found
