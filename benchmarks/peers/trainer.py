"""transformers' Trainer: dynamic padding, grouped by length, flattened, or padded to one length."""

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from numpy.typing import NDArray
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from peers.turns import Turns
from peers.workload import Documents, Workload


def train(work: Workload, documents: Documents, turns: Turns, variant: str) -> None:
    """`variant` is dynamic, grouped, flattened, or the number of tokens that all are padded to."""
    tokenizer = load_tokenizer(work, documents)
    model = GPT2LMHeadModel.from_pretrained(work.model)
    collator: Any = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if variant == "flattened":
        collator = DataCollatorWithFlattening()
    columns: dict[str, Any] = {"input_ids": documents.lists()}
    if variant.isdigit():  # in the data set, as by `tokenizer(text, padding="max_length")`
        columns = dict(padded(columns["input_ids"], int(variant), documents.pad_token_id))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            **trainer_settings(work),
            per_device_train_batch_size=work.documents_per_step,
            train_sampling_strategy="group_by_length" if variant == "grouped" else "random",
        ),
        train_dataset=datasets.Dataset.from_dict(columns),
        data_collator=collator,
    )

    def batch_loss(batch: Sequence[NDArray[Any]]) -> float:
        rows = [{"input_ids": document.tolist()} for document in batch]
        return summed_loss(trainer, model, collator(rows))

    count_labels(model, turns)
    turns.begin(model.get_input_embeddings(), batch_loss)
    trainer.train()


def load_tokenizer(work: Workload, documents: Documents) -> Any:
    """GPT-2's tokenizer, which pads with a token that occurs nowhere."""
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(documents.pad_token_id)
    return tokenizer


def trainer_settings(work: Workload) -> dict[str, Any]:
    """What the comparison fixes; everything else stays at the library's default."""
    return {
        "output_dir": str(work.folder / "trainer"),
        "use_cpu": True,
        "num_train_epochs": 1000,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": work.weight_decay,
        "adam_beta1": work.adam_betas[0],
        "adam_beta2": work.adam_betas[1],
        "adam_epsilon": work.adam_epsilon,
        "max_grad_norm": work.max_grad_norm,
        "seed": work.seed,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def summed_loss(trainer: Any, model: Any, inputs: Any) -> float:
    """The trainer's own mean loss of a batch, times the tokens that it is the mean of."""
    return float(trainer.compute_loss(model, inputs)) * num_labels(inputs)


def count_labels(model: Any, turns: Turns) -> None:
    """Count the tokens that a model of transformers is asked to predict."""

    def before_forward(module: Any, args: Any, kwargs: Any) -> None:
        turns.count(num_labels(kwargs))

    model.register_forward_pre_hook(before_forward, with_kwargs=True)


def num_labels(inputs: Any) -> int:
    """The first position of a row is never predicted."""
    return int((inputs["labels"][:, 1:] != -100).sum())


def padded(
    documents: list[list[int]], length: int, pad_token_id: int
) -> dict[str, list[torch.Tensor]]:
    """Documents cut and padded to one length, and what of it is no padding.

    >>> {key: rows[0].tolist() for key, rows in padded([[7, 8]], 3, 0).items()}
    {'input_ids': [7, 8, 0], 'attention_mask': [1, 1, 0]}
    """
    rows = torch.full((len(documents), length), pad_token_id)
    mask = torch.zeros_like(rows)
    for number, document in enumerate(documents):
        kept = torch.tensor(document[:length])
        rows[number, : len(kept)] = kept
        mask[number, : len(kept)] = 1
    return {"input_ids": list(rows), "attention_mask": list(mask)}
