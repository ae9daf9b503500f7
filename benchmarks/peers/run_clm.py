"""The recipe of transformers' example run_clm_no_trainer: rows of one length cut from all text.

Documents see what stands before them, so that this is another objective: it models a stream.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel, default_data_collator, get_scheduler

from peers.trainer import count_labels, num_labels
from peers.turns import Turns
from peers.workload import Documents, Workload


def train(work: Workload, documents: Documents, turns: Turns, variant: str) -> None:
    """A plain loop over accelerate, with its AdamW and groups, and the comparison's clipping."""
    rows, row_tokens = documents.rows_of_a_step(work)
    stream = documents.stream()
    blocks = stream[: len(stream) // row_tokens * row_tokens].reshape(-1, row_tokens).tolist()
    loader: Any = DataLoader(
        [{"input_ids": block, "labels": block} for block in blocks],  # type: ignore[arg-type]
        shuffle=True,
        collate_fn=default_data_collator,
        batch_size=rows,
    )
    accelerator = Accelerator(cpu=True)
    model = GPT2LMHeadModel.from_pretrained(work.model)
    named = list(model.named_parameters())
    plain = [p for name, p in named if name.endswith("bias") or ".ln_" in name]
    decayed = [p for name, p in named if not (name.endswith("bias") or ".ln_" in name)]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": work.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=work.learning_rate,
        betas=work.adam_betas,
        eps=work.adam_epsilon,
    )
    scheduler = get_scheduler("constant", optimizer)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def batch_loss(batch: Sequence[NDArray[Any]]) -> float:
        total = 0.0
        for document in batch:  # it has no batches of whole documents
            tokens = torch.from_numpy(document)[None]
            inputs = {"input_ids": tokens, "labels": tokens}
            total += float(model(**inputs).loss) * num_labels(inputs)
        return total

    count_labels(model, turns)
    turns.begin(model.get_input_embeddings(), batch_loss)
    model.train()
    while True:
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), work.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
