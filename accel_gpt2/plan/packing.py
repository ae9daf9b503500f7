"""Whether a training puts its documents one after another in rows, and how these attend."""

from accel_gpt2.catalog.gpus import GpuSpec
from accel_gpt2.recipe import TrainRecipe

# Where no kernel reads documents where they are, a packed row's attend in groups of neighbouring
# lengths, each padded to its longest: by no more than this much of its tokens.
GROUP_PADDING = 0.125

_FIRST_WITH_FLASH = (8, 0)  # compute capability: Ampere


def packs_rows(recipe: TrainRecipe) -> bool:
    """Whether micro batches are rows without padding, for a family that can be packed.

    >>> packs_rows(TrainRecipe()), packs_rows(TrainRecipe(packing="off"))
    (True, False)
    >>> packs_rows(TrainRecipe(objective="classification"))
    False
    """
    if recipe.objective not in {"generative", "unconditional"}:
        return False  # a head reads each document's last token, and a hybrid likelihoods of rows
    if recipe.packing == "auto" and recipe.placement == "shared-base":
        # Without dropout batches of all adapters may be stacked, for which they want one shape.
        return recipe.dropout > 0 or recipe.lora_dropout > 0
    return recipe.packing != "off"


def attends_in_groups(recipe: TrainRecipe, gpu: GpuSpec | None) -> bool:
    """Whether packed rows are laid out anew for attention: flash attention for documents of various
    lengths is 16-bit, drops nothing and wants Ampere.

    Args:
        gpu: None for a CPU.

    >>> from accel_gpt2.catalog.gpus import find_gpu
    >>> h100 = find_gpu("NVIDIA H100 80GB HBM3", 80 * 2**30)
    >>> recipe = TrainRecipe(mixed_precision="bf16", dropout=0.0)
    >>> attends_in_groups(recipe, h100), attends_in_groups(recipe, None)
    (False, True)
    >>> attends_in_groups(TrainRecipe(mixed_precision="bf16"), h100)  # dropout
    True
    """
    if not packs_rows(recipe):
        return False
    capability = (0, 0) if gpu is None else gpu.compute_capability
    return not reads_where_they_are(recipe, capability)


def reads_where_they_are(recipe: TrainRecipe, compute_capability: tuple[int, int]) -> bool:
    """Whether a GPU has a kernel for the documents of a packed row as they lie there."""
    half = recipe.mixed_precision != "no"
    return half and recipe.dropout == 0 and compute_capability >= _FIRST_WITH_FLASH
