"""A plain loop over transformers on our own batches, one document after the other.

Nothing is padded or packed, and nothing is ours but the choice of documents: after as many steps
its held-out loss has to be ours.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import GPT2LMHeadModel

from accel_gpt2.train.schedule import BatchSchedule
from peers.turns import Turns
from peers.workload import Documents, Workload, our_recipe


def train(work: Workload, documents: Documents, turns: Turns, variant: str) -> None:
    """The gradients of a step's documents are added up before it is made."""
    recipe = our_recipe(work, global_batch_tokens=documents.budget_of_a_step(work)).recipe
    lengths = np.array([len(document) for document in documents.train])
    schedule = BatchSchedule(lengths, recipe, total_steps=0)  # nobody counts them
    model = GPT2LMHeadModel.from_pretrained(work.model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": work.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=work.learning_rate,
        betas=work.adam_betas,
        eps=work.adam_epsilon,
        fused=True,
    )

    def summed(document: NDArray[Any]) -> Tensor:
        tokens = torch.from_numpy(document)
        logits = model(tokens[None]).logits[0, :-1]
        return F.cross_entropy(logits, tokens[1:], reduction="sum")

    def batch_loss(batch: Sequence[NDArray[Any]]) -> float:
        return sum(float(summed(document)) for document in batch)

    turns.begin(model.get_input_embeddings(), batch_loss)
    for epoch in itertools.count():
        for batch in schedule.epoch(epoch):
            step_tokens = int((lengths[batch] - 1).sum())
            turns.count(step_tokens)
            for index in batch:
                (summed(documents.train[index]) / step_tokens).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, work.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
