"""A model's scores: every document exactly once, on one process or several."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accel_gpt2.data.batching import Documents, Indices, scoring_batches
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.objective import TrainedModel

# Scores stay on the device until so many batches have some: it has to finish whenever one is read,
# and would then have nothing to do while the next batch is put together.
_BATCHES_AHEAD = 16

# More padded tokens than these do not make a CPU's products faster, and are more padding.
_CPU_BATCH_TOKENS = 1024


def tokens_at_once(micro_batch_tokens: int, device: torch.device) -> int:
    """The budget of a batch that is only scored, in padded tokens."""
    return (
        min(micro_batch_tokens, _CPU_BATCH_TOKENS) if device.type == "cpu" else micro_batch_tokens
    )


def score_documents(
    model: TrainedModel,
    documents: Documents,
    *,
    micro_batch_tokens: int,
    accelerator: Any,
    on_batch: Callable[[int], None] | None = None,
    token_scores: NDArray[np.float32] | None = None,
) -> NDArray[np.float64]:
    """The model's score of each document in nats, the same on every rank.

    float64, [num_documents] where it is log p(x): for a causal LM the sum over every token after
    BOS, EOS included, with fp32 log-softmax. [num_documents, num_classes] from a model of all
    classes. Documents are read longest first and dealt out to the ranks; the order of the result is
    the documents' own.

    Args:
        model: unwrapped, on the accelerator's device; its mode (train or eval) is restored.
        accelerator: of accelerate, for the device, the ranks and the mixed precision.
        on_batch: called on all ranks together after each round of batches, with the number of
            documents in it; it may raise.
        token_scores: filled, if given, by a causal LM with what it sums: one number for each token
            after BOS, one document's after the other's.
    """
    lengths = np.asarray(documents.lengths, dtype=np.int64)
    scores = np.zeros((len(lengths), *model.score_shape), dtype=np.float64)
    ends = np.cumsum(lengths - 1)
    budget = tokens_at_once(micro_batch_tokens, accelerator.device)
    batches = scoring_batches(lengths, micro_batch_tokens=budget)
    waiting: list[tuple[Indices, Tensor, Tensor | None]] = []

    def fetch() -> None:
        for indices, found, per_token in waiting:
            scores[indices] = found.cpu().numpy()
            if token_scores is not None and per_token is not None:
                pieces = np.split(per_token.cpu().numpy(), np.cumsum(lengths[indices] - 1)[:-1])
                for i, piece in zip(indices, pieces, strict=True):
                    token_scores[ends[i] - len(piece) : ends[i]] = piece
        waiting.clear()

    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(batches), accelerator.num_processes):
            one_round = batches[start : start + accelerator.num_processes]
            # Who has none scores another rank's in vain: sharded weights are gathered by all.
            idle = accelerator.process_index >= len(one_round)
            indices = one_round[0 if idle else accelerator.process_index]
            batch = [documents.document(int(i)) for i in indices]
            per_token = None
            with accelerator.autocast():
                if token_scores is None or not isinstance(model, LanguageModel):
                    found = model.score(batch, accelerator.device)
                else:
                    found, per_token = model.score_tokens(batch, accelerator.device)
            if not idle:
                waiting.append((indices, found, per_token))
            if len(waiting) == _BATCHES_AHEAD:
                fetch()
            if on_batch is not None:
                on_batch(sum(len(indices) for indices in one_round))
        fetch()
    finally:
        model.train(was_training)
    if accelerator.num_processes > 1:
        _share(scores, accelerator)
        if token_scores is not None:
            _share(token_scores, accelerator)
    return scores


def _share(values: NDArray[Any], accelerator: Any) -> None:
    """Put every rank's values in place: each is zero on all ranks but one, so a sum does it."""
    shared = torch.from_numpy(values).to(accelerator.device)
    torch.distributed.all_reduce(shared)
    values[...] = shared.cpu().numpy()
