"""What a training's speed and memory are measured against."""

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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
    # The mean over tokens: a long document has more tokens, and each of them the long context.
    tokens = np.asarray(lengths, dtype=np.float64) - 1
    return train_flops_per_token(
        n_layer=n_layer,
        n_embd=n_embd,
        vocab_size=vocab_size,
        context_tokens=float((tokens**2).sum() / tokens.sum()),
        frozen_base=recipe.finetuning != "full",
    )


class StepTimer:
    """Seconds and tokens of training steps alone, without what comes between them.

    The first steps are slower (memory is taken, kernels are chosen) and do not count.
    """

    _WARM_UP_STEPS = 3

    def __init__(self) -> None:
        self._added = 0
        self._seconds = 0.0
        self._tokens = 0

    def add(self, seconds: float, tokens: int) -> None:
        """One step: a whole optimizer step of all processes."""
        self._added += 1
        if self._added > self._WARM_UP_STEPS:
            self._seconds += seconds
            self._tokens += tokens

    @property
    def num_steps(self) -> int:
        """Steps that count."""
        return max(0, self._added - self._WARM_UP_STEPS)

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens over seconds of the steps that count."""
        return self._tokens / max(1e-9, self._seconds)


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
