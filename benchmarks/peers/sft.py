"""TRL's SFTTrainer with packing: best-fit rows, without padding between documents."""

from collections.abc import Sequence
from typing import Any

import datasets
from numpy.typing import NDArray
from transformers import GPT2LMHeadModel
from trl import SFTConfig, SFTTrainer

from peers.trainer import count_labels, load_tokenizer, summed_loss, trainer_settings
from peers.turns import Turns
from peers.workload import Documents, Workload


def train(work: Workload, documents: Documents, turns: Turns, variant: str) -> None:
    """Rows as long as the step allows, at most the model's positions."""
    rows, row_tokens = documents.rows_of_a_step(work)
    model = GPT2LMHeadModel.from_pretrained(work.model)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **trainer_settings(work),
            bf16=False,  # its own default, which no CPU wants
            gradient_checkpointing=False,  # its default too, and nobody else recomputes
            packing=True,
            max_length=row_tokens,
            per_device_train_batch_size=rows,
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": documents.lists()}),
        processing_class=load_tokenizer(work, documents),
    )

    def batch_loss(batch: Sequence[NDArray[Any]]) -> float:
        rows = [{"input_ids": x.tolist(), "seq_lengths": [len(x)]} for x in batch]
        return summed_loss(trainer, model, trainer.data_collator(rows))

    count_labels(model, turns)
    turns.begin(model.get_input_embeddings(), batch_loss)
    trainer.train()
