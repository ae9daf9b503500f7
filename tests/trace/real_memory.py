"""What a training really allocates on a CPU, from the events of torch's own allocator."""

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from accel_gpt2.trace.measured import peak_allocated_bytes
from accel_gpt2.trace.memory import TraceRequest
from accel_gpt2.trace.step import StockLoss, training_step
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import to_device
from accel_gpt2.train.optim import build_optimizer

_CPU = torch.device("cpu")


def real_peak_bytes(request: TraceRequest) -> tuple[int, int]:
    """The most that two training steps hold, and an evaluation after them."""
    recipe, vocab_size = request.recipe, request.vocab_size
    assert vocab_size is not None
    model = build_model(
        recipe,
        vocab_size=vocab_size,
        eos_token_id=vocab_size - 1,
        mask_token_id=vocab_size - 2,
        pad_token_id=1 if recipe.objective in {"masked_lm", "classification"} else None,
        class_names=["a", "b"],
        log_prior=np.log([0.5, 0.5]),
    )
    model.pack_rows(recipe, _CPU)
    count = recipe.micro_batch_tokens // (request.longest_tokens - 1)
    lengths = [request.longest_tokens] * count
    if recipe.objective in {"masked_lm", "classification"}:
        lengths[-1] -= 1  # padding, and so a mask
    documents, labels = [np.full(length, 3) for length in lengths], np.zeros(count, dtype=np.int64)
    trained = StockLoss(model.finals[0].model) if request.stock_loss else model
    optimizer = build_optimizer(model, recipe)

    def micro_batch() -> tuple[torch.Tensor, ...]:
        return to_device(model.collate(documents, labels, epoch=0), _CPU)

    def train() -> None:
        for _ in range(2):
            training_step(
                trained,
                optimizer,
                [micro_batch] * request.num_micro_batches,
                recipe,
                num_targets=1,
            )

    def evaluate() -> None:
        model.eval()
        model.score(documents, _CPU)

    static = [*model.parameters(), *model.buffers()]
    training = _bytes(static) + peak_allocated_bytes(_CPU, train)
    outputs = tree_leaves(trained.outputs) if isinstance(trained, StockLoss) else []
    held = _bytes([*static, *tree_leaves(dict(optimizer.state)), *outputs])
    return training, held + peak_allocated_bytes(_CPU, evaluate)


def _bytes(values: list[object]) -> int:
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in values
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())
