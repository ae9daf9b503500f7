"""What the ranks of a test do with ZeRO below a whole training."""

import gc
import math
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel_gpt2.classify.fit import fit
from accel_gpt2.recipe import ResolvedRecipe, TrainRecipe
from accel_gpt2.train.backend import Backend, build_backend
from accel_gpt2.train.deepspeed import DeepSpeedBackend
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import to_device
from accel_gpt2.train.processes import build_accelerator

from .sharding import Documents


def _build(recipe: TrainRecipe) -> tuple[Any, Backend]:
    accelerator = build_accelerator(recipe)
    model = build_model(recipe, vocab_size=300, eos_token_id=0)
    return accelerator, build_backend(accelerator, model, recipe)


def _step(accelerator: Any, backend: Backend, lengths: list[int], *, scale: float = 0.01) -> float:
    """A step of two micro batches, the same documents on every rank; its gradient norm."""
    model = backend.plain_model
    documents = [Documents(lengths).document(index) for index in range(len(lengths))]
    arrays = model.collate(documents, np.zeros(len(lengths), dtype=np.int64), epoch=0)
    tensors = to_device(arrays, accelerator.device)
    for last in (False, True):
        backend.run(tensors, scale=scale, last=last)
    return backend.clip_grad_norm(1.0)


def steps_of_scales(recipe: TrainRecipe, scales: Sequence[float]) -> dict[str, Any]:
    """Steps whose losses are scaled by these: their gradient norms, the weights before and after,
    and the optimizer's state."""
    accelerator, backend = _build(recipe)
    before = {name: weight.clone() for name, weight in backend.gathered_weights().items()}
    norms = []
    for scale in scales:
        norms.append(_step(accelerator, backend, [20, 12], scale=scale))
        if math.isfinite(norms[-1]):
            backend.step()
        else:
            backend.skip()
        backend.zero_grad()
    return {
        "norms": norms,
        "before": before,
        "after": backend.gathered_weights(),
        "optimizer": backend.gathered_optimizer_state(),
    }


def norms_of_repeated(recipe: TrainRecipe, counts: Sequence[int]) -> list[float]:
    """Gradient norms of steps of so many micro batches, all alike; the weights stay."""
    accelerator, backend = _build(recipe)
    model = backend.plain_model
    arrays = model.collate([Documents([9]).document(0)], np.zeros(1, dtype=np.int64), epoch=0)
    tensors = to_device(arrays, accelerator.device)
    norms = []
    for count in counts:
        for number in range(1, count + 1):
            backend.run(tensors, scale=0.01, last=number == count)
        norms.append(backend.clip_grad_norm(1.0))
        backend.step()
        backend.zero_grad()
    return norms


def gone_on(recipe: TrainRecipe) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after two steps with dropout, and after the second of them in a new backend that
    goes on from what the first step left."""
    accelerator, backend = _build(recipe)
    _step(accelerator, backend, [20, 12])
    backend.step()
    saved = [backend.gathered_weights(), backend.gathered_optimizer_state()]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(saved, src=0)
    found = []
    for anew in (False, True):
        if anew:
            model = build_model(recipe, vocab_size=300, eos_token_id=0)
            model.load_trainable_state(saved[0], Path("saved"))
            backend = build_backend(accelerator, model, recipe)
            backend.load_optimizer_state(saved[1])
        torch.manual_seed(accelerator.process_index)
        _step(accelerator, backend, [30, 11])
        backend.step()
        found.append(backend.gathered_weights())
    return found[0], found[1]


def own_elements(recipe: TrainRecipe) -> dict[str, int]:
    """Elements of this rank's fp32 weights, of each moment, and of the weights between steps."""
    accelerator, backend = _build(recipe)
    assert isinstance(backend, DeepSpeedBackend)
    _step(accelerator, backend, [20, 12])
    backend.step()
    moments = [backend.optimizer.optimizer.state[shard]["exp_avg"] for shard in backend.parameters]
    kept = [
        getattr(weight, "ds_tensor", weight)
        for weight in backend.plain_model.parameters()
        if not getattr(weight, "ds_persist", False)
    ]
    return {
        "fp32 weights": sum(shard.numel() for shard in backend.parameters),
        "moments": sum(moment.numel() for moment in moments),
        "weights": sum(weight.numel() for weight in kept),
    }


def probed_alone(recipe: TrainRecipe) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """A pass that only the first rank makes, twice: the gradients that it leaves, and the weights
    of a step after it and of one without it."""
    gradients = 0
    found = []
    for probing in (True, False):
        accelerator, backend = _build(recipe)
        model = backend.plain_model
        if probing:
            with backend.probing():
                if accelerator.is_main_process:
                    for _ in range(2):
                        arrays = model.collate(
                            [Documents([9]).document(0)], np.zeros(1, dtype=np.int64), epoch=0
                        )
                        model(*to_device(arrays, accelerator.device)).backward()
                    kept = [x.grad for x in model.parameters() if x.grad is not None]
                    gradients = sum(gradient.numel() for gradient in kept)
            model.zero_grad(set_to_none=True)
        _step(accelerator, backend, [20, 12])
        backend.step()
        found.append(backend.gathered_weights())
    return gradients, found[0], found[1]


def is_let_go_of(recipe: TrainRecipe) -> bool:
    """Whether nothing keeps a model when its backend is closed."""
    accelerator, backend = _build(recipe)
    _step(accelerator, backend, [20, 12])
    backend.step()
    with backend.scoring():
        pass
    model = weakref.ref(backend.plain_model)
    backend.close()
    del backend
    accelerator.free_memory()
    gc.collect()
    return model() is None


def train_without_compiler(resolved: ResolvedRecipe, run: Path, compiled: Path) -> list[str]:
    """Train where compiled operators would be put; what there is of them."""
    compiled.mkdir(exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(compiled)
    torch.set_num_threads(1)
    fit(resolved, run, quiet=True)
    return sorted(os.listdir(compiled))
