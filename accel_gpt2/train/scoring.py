"""log p(document | class): every document exactly once, on one process or several."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from accel_gpt2.data.batching import Documents, TokenBatch, collate, scoring_batches
from accel_gpt2.train.model import LanguageModel


def to_device(batch: TokenBatch, device: torch.device) -> tuple[torch.Tensor, ...]:
    """(input_ids, targets, valid) on the device, copied without waiting where the device allows."""
    tensors = [torch.from_numpy(x) for x in (batch.input_ids, batch.targets, batch.valid)]
    if device.type == "cuda":
        return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
    return tuple(tensor.to(device) for tensor in tensors)


def score_documents(
    model: LanguageModel,
    documents: Documents,
    *,
    micro_batch_tokens: int,
    accelerator: Any,
    on_batch: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """log p(x) in nats of each document, float64 [num_documents], the same on every rank.

    The sum runs over every token after BOS, EOS included; log-softmax is fp32 and the sum float64.
    Documents are read longest first and dealt out to the ranks; the order of the result is the
    documents' own.

    Args:
        model: unwrapped, on the accelerator's device; its mode (train or eval) is restored.
        accelerator: of accelerate, for the device, the ranks and the mixed precision.
        on_batch: called on all ranks together after each round of batches, with the number of
            documents in it; it may raise.
    """
    scores = np.zeros(len(documents.lengths), dtype=np.float64)
    batches = scoring_batches(documents.lengths, micro_batch_tokens=micro_batch_tokens)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(batches), accelerator.num_processes):
            one_round = batches[start : start + accelerator.num_processes]
            if accelerator.process_index < len(one_round):
                indices = one_round[accelerator.process_index]
                batch = collate([documents.document(int(i)) for i in indices])
                with accelerator.autocast():
                    likelihoods = model.document_log_likelihoods(
                        *to_device(batch, accelerator.device)
                    )
                scores[indices] = likelihoods.cpu().numpy()
            if on_batch is not None:
                on_batch(sum(len(indices) for indices in one_round))
    finally:
        model.train(was_training)
    if accelerator.num_processes > 1:
        # Each document is zero on all ranks but one, so a sum puts every score in its place.
        shared = torch.from_numpy(scores).to(accelerator.device)
        torch.distributed.all_reduce(shared)
        scores = shared.cpu().numpy()
    return scores
