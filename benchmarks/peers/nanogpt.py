"""nanoGPT: its own train.py, from a copy outside the repository.

It cuts rows anywhere from the stream of all text, so that this is another objective, and has
50,304 words, the vocabulary padded to a multiple of 64.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import GPT2LMHeadModel

from peers.turns import Turns
from peers.workload import Documents, Workload

_VOCABULARY = 50304
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def train(work: Workload, documents: Documents, turns: Turns, variant: str) -> None:
    """Run train.py, which goes on from a checkpoint that holds the initial weights."""
    assert work.nanogpt is not None
    os.chdir(work.nanogpt)
    sys.path.insert(0, str(work.nanogpt))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    rows, row_tokens = documents.rows_of_a_step(work)
    folder = work.folder / "nanogpt"
    folder.mkdir(exist_ok=True)
    documents.stream().astype(np.uint16).tofile(folder / "train.bin")
    documents.stream().astype(np.uint16).tofile(folder / "val.bin")
    settings = {
        "n_layer": work.num_layers,
        "n_head": work.num_heads,
        "n_embd": work.width,
        "block_size": 1024,
        "bias": True,
        "vocab_size": _VOCABULARY,
        "dropout": 0.0,
    }
    model = GPT(GPTConfig(**settings))
    adamw = (work.weight_decay, work.learning_rate, work.adam_betas, "cpu")
    checkpoint = {
        "model": _weights(work),
        "model_args": settings,
        "optimizer": model.configure_optimizers(*adamw).state_dict(),
        "iter_num": 1,  # 0 and every multiple of eval_interval evaluate
        "best_val_loss": 1e9,
    }
    torch.save(checkpoint, folder / "ckpt.pt")
    build_optimizer = GPT.configure_optimizers

    def wait_first(model: Any, *args: Any) -> Any:
        embedding = model.transformer.wte
        embedding.register_forward_pre_hook(lambda _, inputs: turns.count(inputs[0].numel()))
        turns.begin(embedding, lambda batch: _loss(model, batch))
        return build_optimizer(model, *args)

    GPT.configure_optimizers = wait_first  # the last thing that train.py builds
    options = {
        "init_from": "resume",
        "out_dir": folder,
        "dataset": folder,
        "eval_interval": 10**9,
        "batch_size": rows,
        "block_size": row_tokens,
        "gradient_accumulation_steps": 1,
        "learning_rate": work.learning_rate,
        "decay_lr": False,
        "weight_decay": work.weight_decay,
        "beta1": work.adam_betas[0],
        "beta2": work.adam_betas[1],
        "grad_clip": work.max_grad_norm,
        "max_iters": 10**9,
        "device": "cpu",
        "dtype": "float32",
        "compile": False,  # nobody else is compiled here either
    }
    sys.argv = ["train.py", *(f"--{key}={value}" for key, value in options.items())]
    runpy.run_path("train.py", run_name="__main__")


def _weights(work: Workload) -> dict[str, torch.Tensor]:
    weights = GPT2LMHeadModel.from_pretrained(work.model).state_dict()
    for name in weights:
        if name.endswith(_TRANSPOSED):
            weights[name] = weights[name].t().contiguous()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = F.pad(weights[name], (0, 0, 0, _VOCABULARY - len(weights[name])))
    return dict(weights)


def _loss(model: Any, batch: Sequence[NDArray[Any]]) -> float:
    total = 0.0
    for document in batch:  # it has no batches of whole documents
        tokens = torch.from_numpy(document)[None]
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
        total += float(loss) * (len(document) - 1)
    return total
