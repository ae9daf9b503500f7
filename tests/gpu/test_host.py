"""The host never waits for a GPU within a step; `make gpu-check` runs it."""

import numpy as np
import pytest
import torch

from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.backend import PlainBackend
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import to_device
from accel_gpt2.train.prefetch import Awaited
from accel_gpt2.train.processes import build_accelerator


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_a_step_is_queued_without_waiting(finetuning: str) -> None:
    """torch raises where an operation would have to wait; only reading the norm does, and it is
    there when the next step has been queued."""
    recipe = TrainRecipe(
        model="gpt2-tiny",
        init="scratch",
        max_length=65,
        dropout=0.0,
        finetuning=finetuning,  # type: ignore[arg-type]
        mixed_precision="bf16",
    )
    accelerator = build_accelerator(recipe)
    model = build_model(recipe, vocab_size=512, eos_token_id=0).to(accelerator.device).train()
    backend = PlainBackend(accelerator, model, recipe)
    random = np.random.default_rng(0)
    documents = [random.integers(0, 512, length) for length in (65, 40, 3)]

    def step() -> None:
        batch = model.collate(documents, np.zeros(3, dtype=np.int64), epoch=0)
        tensors = to_device(batch, accelerator.device)
        backend.run(tensors, scale=1 / 105, last=True)
        norms.append(backend.update(1.0))

    norms: list[Awaited] = []
    step()  # states are made, kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(np.isfinite(norm.read()) for norm in norms)
