"""The host never waits for a GPU within a step; `make gpu-check` runs it."""

import numpy as np
import pytest
import torch

from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.backend import PlainBackend
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import to_device
from accel_gpt2.train.packing import _flash_problem
from accel_gpt2.train.prefetch import Awaited
from accel_gpt2.train.processes import build_accelerator


@pytest.mark.parametrize("rows", ["padded", "in groups", "as they lie"])
@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_a_step_is_queued_without_waiting(finetuning: str, rows: str) -> None:
    """torch raises where an operation would have to wait; only reading the norm does, and it is
    there when the next step has been queued."""
    recipe = TrainRecipe(
        model="gpt2-tiny",
        init="scratch",
        max_length=65,
        dropout=0.1 if rows == "in groups" else 0.0,
        packing="off" if rows == "padded" else "on",
        finetuning=finetuning,  # type: ignore[arg-type]
        mixed_precision="bf16",
    )
    accelerator = build_accelerator(recipe)
    model = build_model(recipe, vocab_size=512, eos_token_id=0).to(accelerator.device).train()
    model.pack_rows(recipe, accelerator.device)
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


@pytest.mark.parametrize("heads", [(12, 12), (8, 2)], ids=["GPT-2's", "grouped"])
def test_flash_attention_reads_documents_as_groups_of_them_are_read(heads: tuple[int, int]) -> None:
    """Outputs and gradients, in both 16-bit types, where the GPU has the kernel."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention wants Ampere")
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in (torch.float16, torch.bfloat16):
        assert _flash_problem(*heads, 64, dtype, device) is None
