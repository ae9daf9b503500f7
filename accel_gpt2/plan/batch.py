"""How much goes through a machine at once. The global batch is the recipe's and stays as it is."""

from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.units import GIB

# (micro_batch_tokens, gradient_checkpointing) by GPU memory (up to so many GiB) and by model size
# (up to so many parameters). Fitted by hand to full fine-tuning with AdamW and 16-bit autocast:
# 18 bytes a parameter, 86 bytes x n_layer x n_embd a token without checkpointing, 2 GiB besides,
# and half of what is left kept free. Where full fine-tuning does not fit at all, LoRA does.
_MODEL_PARAMETERS = (200e6, 500e6, 1e9, float("inf"))
_BY_GPU_GIB: tuple[tuple[float, tuple[tuple[int, bool], ...]], ...] = (
    (10, ((2048, False), (1024, True), (1024, True), (1024, True))),
    (14, ((4096, False), (2048, True), (1024, True), (1024, True))),
    (18, ((8192, False), (2048, False), (1024, True), (1024, True))),
    (34, ((8192, False), (4096, False), (4096, True), (1024, True))),
    (50, ((16384, False), (8192, False), (4096, False), (4096, True))),
    (float("inf"), ((32768, False), (16384, False), (8192, False), (4096, False))),
)


def profile_recipe_defaults(profile: HardwareProfile, model: ModelSpec | None) -> dict[str, object]:
    """What a machine changes in the recipe: precision, micro-batch and gradient checkpointing.

    A model without a row (`model` is None) has an unknown size and is treated as the largest.

    >>> from accel_gpt2.catalog.models import MODELS
    >>> from accel_gpt2.catalog.profiles import PROFILES
    >>> profile_recipe_defaults(PROFILES["rtx4070ti"], MODELS["gpt2-large"])
    {'mixed_precision': 'bf16', 'micro_batch_tokens': 1024, 'gradient_checkpointing': True}
    """
    if profile.gpu is None:
        micro_batch_tokens, gradient_checkpointing = 4096, False
    else:
        gpu_gib = profile.gpu.memory_bytes / GIB
        by_model = next(row for limit, row in _BY_GPU_GIB if gpu_gib <= limit)
        parameters = float("inf") if model is None else model.num_parameters
        size = next(i for i, limit in enumerate(_MODEL_PARAMETERS) if parameters <= limit)
        micro_batch_tokens, gradient_checkpointing = by_model[size]
    return {
        **profile.recipe_defaults,
        "micro_batch_tokens": micro_batch_tokens,
        "gradient_checkpointing": gradient_checkpointing,
    }
