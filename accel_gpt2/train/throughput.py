"""What a training's speed and memory are measured against."""

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from accel_gpt2.catalog.gpus import GpuSpec
from accel_gpt2.plan.flops import train_flops_per_token
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.objective import TrainedModel


def flops_per_token(
    model: TrainedModel, lengths: NDArray[Any], recipe: TrainRecipe
) -> float | None:
    """What MFU is measured against; None where the model's arithmetic is not known."""
    if not isinstance(model, LanguageModel):
        return None
    config = model.transformers_model.config
    sizes = [getattr(config, key, None) for key in ("n_layer", "n_embd", "vocab_size")]
    if config.model_type != "gpt2" or None in sizes:
        return None
    n_layer, n_embd, vocab_size = (int(size) for size in sizes if size is not None)

    def full(context_tokens: float) -> float:
        return train_flops_per_token(
            n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size, context_tokens=context_tokens
        )

    # The mean over tokens: a long document has more tokens, and each of them the long context.
    tokens = np.asarray(lengths, dtype=np.float64) - 1
    flops = full(float((tokens**2).sum() / tokens.sum()))
    # A frozen base has no weight gradients: 4 operations per weight in place of 6.
    return flops - full(0) / 3 if recipe.finetuning != "full" else flops


def peak_flops_per_second(gpu: GpuSpec | None, mixed_precision: str) -> float | None:
    if gpu is None:
        return None
    computed_in = {"no": "fp32", "pure_bf16": "bf16"}.get(mixed_precision, mixed_precision)
    return gpu.peak_flops.get(computed_in)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
