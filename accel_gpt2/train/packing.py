"""Causal attention without a mask, and documents one after another in a row, without padding, each
attending to itself alone.

The model's code is transformers' own: only the attention function is ours, by its
`AttentionInterface`, and a packed row's positions begin anew with every document. On a GPU the
kernel is flash attention for documents of various lengths (`torch.nn.attention.varlen`). Where that
is not to be had (fp32, dropout, an older GPU, a CPU) queries, keys and values are laid out in
groups of documents of neighbouring lengths, with a little padding, which is exact for causal
attention too: no document sees what is right of it.
"""

import functools
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from accel_gpt2.data.batching import pack
from accel_gpt2.errors import UserError
from accel_gpt2.plan.packing import packs_rows, reads_where_they_are
from accel_gpt2.recipe import TrainRecipe

ATTENTION = "accel_gpt2_causal"

# By transformers' `model_type`: those that tests/train/test_packing.py packs. Another one may keep
# what it is called with from its attention, or see a window only.
PACKED_FAMILIES = ("gpt2", "gpt_neox", "llama")


_HALF = (torch.float16, torch.bfloat16)


class RowDocuments(NamedTuple):
    """Where the documents of a packed row are: see `data.batching.PackedBatch`. A tuple, which
    checkpointing and dynamo know.

    Attributes:
        starts: int32 [documents + 1].
        slots: int64 [num_tokens].
        groups: empty, [documents, longest, 0] of each group.
        flash: whether the GPU's kernel reads them where they are.
    """

    starts: Tensor
    slots: Tensor
    groups: tuple[Tensor, ...]
    flash: bool


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: RowDocuments | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document of a packed row; transformers' own where rows are
    documents.

    Args:
        query, key, value: [rows, heads, num_tokens, width], a packed row alone.

    Returns:
        [rows, num_tokens, heads, width], and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if documents is None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
        return whole
    if documents.flash and query.dtype in _HALF:
        return _flash_attention(query, key, value, documents, scaling), None
    found_by_group: list[Tensor] = []
    for tensors in zip(*(_by_group(x, documents) for x in (query, key, value)), strict=True):
        group, _ = sdpa_attention_forward(
            module, *tensors, None, scaling=scaling, dropout=dropout, is_causal=True
        )
        found_by_group.append(group.flatten(0, 1))
    return torch.cat(found_by_group).index_select(0, documents.slots)[None], None


def _by_group(packed: Tensor, documents: RowDocuments) -> list[Tensor]:
    """[documents, heads, longest, width] of each group from [1, heads, num_tokens, width], padded
    with zeros."""
    tokens = packed[0].transpose(0, 1)
    shapes = [group.shape[:2] for group in documents.groups]
    sizes = [rows * longest for rows, longest in shapes]
    padded = tokens.new_zeros(sum(sizes), *tokens.shape[1:])
    padded.index_put_((documents.slots,), tokens)  # index_copy_ would keep `tokens` for backward
    parts = zip(torch.split(padded, sizes), shapes, strict=True)
    return [part.view(*shape, *tokens.shape[1:]).transpose(1, 2) for part, shape in parts]


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: RowDocuments, scaling: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(group.shape[1] for group in documents.groups)
    # Said only where it is needed: older torch has no such argument.
    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    out: Any = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        documents.starts,
        documents.starts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        **grouped,
    )
    found: Tensor = out[None]
    return found


def rows_are_packed(recipe: TrainRecipe, model: Any) -> bool:
    """Whether the recipe's training of this language model packs its rows.

    Args:
        model: of transformers.

    Raises:
        UserError: when the recipe asks for packing and it cannot be had.
    """
    if not packs_rows(recipe) or model.config.model_type in PACKED_FAMILIES:
        return packs_rows(recipe)
    if recipe.packing == "on":
        raise UserError(
            f"packing = 'on': {type(model).__name__} is not of a family whose attention was "
            f"checked ({', '.join(PACKED_FAMILIES)}); give --set packing=off, or leave it out."
        )
    return False


def reads_rows(recipe: TrainRecipe, model: Any, device: torch.device) -> bool:
    """Whether flash attention reads the documents of this model's packed rows where they are: such
    a GPU has to give, this once, what groups of documents give, or it does not."""
    if device.type != "cuda":
        return False
    if not reads_where_they_are(recipe, torch.cuda.get_device_capability(device)):
        return False
    config = model.config
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype = torch.float16 if recipe.mixed_precision == "fp16" else torch.bfloat16
    problem = _flash_problem(heads, key_heads, width, dtype, device)
    if problem is not None:
        warnings.warn(
            "Flash attention for documents of various lengths is left out, since on this GPU it "
            f"{problem}; documents attend in groups of neighbouring lengths.",
            stacklevel=2,
        )
    return problem is None


@functools.cache
def _flash_problem(
    heads: int, key_heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """What is wrong with the kernel's outputs and gradients for three documents, as a clause."""
    batch = pack([np.zeros(n, dtype=np.int64) for n in (131, 65, 2)])
    row = RowDocuments(
        starts=torch.from_numpy(batch.starts).to(device),
        slots=torch.from_numpy(batch.slots).to(device),
        groups=tuple(torch.from_numpy(group).to(device) for group in batch.groups),
        flash=True,
    )
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = [
        torch.randn(1, n, 195, width, generator=generator, device=device).to(dtype).requires_grad_()
        for n in (heads, key_heads, key_heads)
    ]
    attention = nn.Module()
    attention.num_key_value_groups = heads // key_heads  # type: ignore[assignment]
    attention.is_causal = True  # type: ignore[assignment]
    found = []
    try:
        for flash in (True, False):
            documents = row._replace(flash=flash)
            out, _ = causal_attention(attention, query, key, value, None, documents=documents)
            gradients = torch.autograd.grad(out.float().square().sum(), (query, key, value))
            found.append([out.float(), *(x.float() for x in gradients)])
    except (RuntimeError, ValueError, TypeError, ImportError) as error:
        return f"fails ({str(error).splitlines()[0]})"
    for mine, its in zip(*found, strict=True):
        # 16-bit rounding of two kernels; a document that sees another one is off by its values.
        if not bool((mine - its).norm() <= 0.02 * its.norm()):
            return "gives other values"
    return None


def use_causal_attention(model: Any) -> None:
    """Have a model of transformers attend without a mask, and take `documents`, a `RowDocuments`,
    in its forward pass; a family whose attention was not checked is left as it is.

    With its own attention function transformers looks in every forward pass whether `position_ids`
    are a packed row's, and a GPU has to finish all that is queued before the host can know.
    """
    from transformers import AttentionInterface

    if model.config.model_type in PACKED_FAMILIES:
        AttentionInterface.register(ATTENTION, causal_attention)
        model.set_attn_implementation(ATTENTION)
