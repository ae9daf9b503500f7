"""litgpt's full fine-tuning: its own loop over its own GPT, which has rotary positions and a head
of its own; a model of the same sizes, and not the same model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune.full import fit, get_lr_scheduler
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from peers.turns import Turns
from peers.workload import Documents, Workload


class _Rows(Dataset[dict[str, Any]]):
    """What litgpt's SFTDataset yields, of documents that are tokens already."""

    def __init__(self, documents: Sequence[NDArray[Any]]) -> None:
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.from_numpy(self._documents[index])
        counts = {"raw": len(tokens), "raw_plus_prompt_template": len(tokens)}
        return {"input_ids": tokens, "labels": tokens, "token_counts": counts}


def train(work: Workload, documents: Documents, turns: Turns, variant: str) -> None:
    """Random batches, padded to their longest document; the optimizer that litgpt builds."""
    config = Config(
        block_size=1024,
        n_layer=work.num_layers,
        n_embd=work.width,
        n_head=work.num_heads,
        vocab_size=50257,
        padding_multiple=128,  # of its Pythia models: 50,304 words
        parallel_residual=False,
        gelu_approximate="tanh",
    )
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.seed_everything(work.seed)
    model = GPT(config)
    model.apply(_initialize)
    embedding = cast(torch.nn.Embedding, model.transformer.wte)
    model = fabric.setup(model)
    adamw = {
        "class_path": "torch.optim.AdamW",
        "init_args": {
            "lr": work.learning_rate,
            "weight_decay": work.weight_decay,
            "betas": work.adam_betas,
            "eps": work.adam_epsilon,
        },
    }
    optimizer = fabric.setup_optimizers(instantiate_torch_optimizer(adamw, model.parameters()))
    collator = get_sft_collate_fn(pad_id=documents.pad_token_id)
    loaders = [
        fabric.setup_dataloaders(
            DataLoader(
                _Rows(part), batch_size=work.documents_per_step, shuffle=True, collate_fn=collator
            )
        )
        for part in (documents.train, documents.held_out)
    ]

    def batch_loss(batch: Sequence[NDArray[Any]]) -> float:
        rows = _Rows(batch)
        collated = collator([rows[index] for index in range(len(rows))])
        labels = collated["labels"][:, 1:]
        logits = model(collated["input_ids"])[:, :-1]
        return float(chunked_cross_entropy(logits, labels)) * int((labels != -100).sum())

    def count_documents(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        kept = inputs[0] != documents.pad_token_id
        turns.count(int(kept[:, 1:].sum()))

    embedding.register_forward_pre_hook(count_documents)
    turns.begin(embedding, batch_loss)
    fit(
        fabric,
        {
            "model": model,
            "optimizer": optimizer,
            "scheduler": get_lr_scheduler(optimizer, warmup_steps=1, max_steps=10**9),
            "iter_num": 0,
            "step_count": 0,
        },
        *loaders,
        devices=1,
        resume=False,
        checkpoint_dir=work.model,
        out_dir=Path(work.folder / "litgpt"),
        train=TrainArgs(
            save_interval=None,
            global_batch_size=work.documents_per_step,
            micro_batch_size=work.documents_per_step,
            epochs=1000,
        ),
        eval=EvalArgs(interval=10**9),
        data=DataModule,  # asked for a prompt when it evaluates
    )


def _initialize(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
        torch.nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, torch.nn.Linear) and module.bias is not None:
        torch.nn.init.zeros_(module.bias)
