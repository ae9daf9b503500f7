"""The largest micro batch that this machine can train on, found out before the first step."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from accel_gpt2.data.batching import Documents, largest_micro_batch
from accel_gpt2.errors import DoesNotFitError
from accel_gpt2.failures import machine_failure
from accel_gpt2.train.backend import Backend
from accel_gpt2.train.objective import to_device


def fitting_micro_batch_tokens(
    backend: Backend,
    documents: Documents,
    *,
    micro_batch_tokens: int,
    reserved_bytes: int,
    accelerator: Any,
    on_halved: Callable[[int], None],
) -> int:
    """`micro_batch_tokens`, halved until one forward and backward pass fits on every rank.

    The pass is over as large a micro batch as the training can have. It changes nothing: random
    state and gradients are as before. Half a micro batch means twice the accumulation, so the
    global batch and the result stay.

    Args:
        backend: lets each rank try for itself; one that ran out of memory within an exchange would
            leave the others waiting in it.
        reserved_bytes: what the training will hold besides, such as an optimizer's state that its
            first step creates. Ignored on a CPU, where untouched memory costs nothing.
        on_halved: called on all ranks with each smaller number.

    Raises:
        DoesNotFitError: when a micro batch of a single document does not fit.
    """
    while True:
        chosen = largest_micro_batch(
            documents.lengths,
            micro_batch_tokens=micro_batch_tokens,
            packed=backend.plain_model.packed,
        )
        batch = [documents.document(int(i)) for i in chosen]
        if _fits_on_all(backend, batch, reserved_bytes, accelerator):
            return micro_batch_tokens
        tokens = len(batch) * (max(map(len, batch)) - 1)
        if backend.plain_model.packed:
            tokens = sum(map(len, batch)) - len(batch)
        if len(batch) == 1:
            raise DoesNotFitError(
                f"Out of memory with a micro batch of one document of {tokens + 1} tokens; give "
                "--gradient-checkpointing, a smaller --max-length, --finetuning lora, --optimizer "
                "adamw_8bit, a smaller model or a larger machine."
            )
        # What comes next must be smaller: a micro batch holds whole documents.
        micro_batch_tokens = min(micro_batch_tokens, tokens) // 2
        on_halved(micro_batch_tokens)


def _fits_on_all(backend: Backend, batch: list[Any], reserved_bytes: int, accelerator: Any) -> bool:
    device: torch.device = accelerator.device
    failed = torch.tensor(not _fits(backend, batch, reserved_bytes, accelerator), device=device)
    if accelerator.num_processes > 1:
        failed = failed.to(torch.int32)
        torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
    return not bool(failed)


def _fits(backend: Backend, batch: list[Any], reserved_bytes: int, accelerator: Any) -> bool:
    from accelerate.utils.memory import clear_device_cache

    device: torch.device = accelerator.device
    cuda_devices = [device] if device.type == "cuda" else []
    failed = False
    with torch.random.fork_rng(cuda_devices):
        try:
            _forward_and_backward(backend, batch, reserved_bytes, accelerator)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(machine_failure(error), DoesNotFitError):
                raise
            failed = True
    backend.plain_model.zero_grad(set_to_none=True)
    if failed:
        # Here and not in the handler: the exception holds the frames, and they the tensors.
        gc.collect()
        clear_device_cache()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    return not failed


def _forward_and_backward(
    backend: Backend, batch: list[Any], reserved_bytes: int, accelerator: Any
) -> None:
    device: torch.device = accelerator.device
    reserved = torch.empty(reserved_bytes, dtype=torch.uint8, device=device)
    model = backend.plain_model
    # Any class will do: what it costs is the same.
    arrays = model.collate(batch, np.zeros(len(batch), dtype=np.int64), epoch=0)
    with backend.probing():
        model(*to_device(arrays, device)).backward()
    del reserved  # held until here
