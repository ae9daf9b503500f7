"""Causal attention without a mask, and documents one after another in a row, without padding, each
attending to itself alone.

The model's code is transformers' own: only the attention function is ours, by its
`AttentionInterface`, and a packed row's positions begin anew with every document. On a GPU the
kernel is flash attention for documents of various lengths (`torch.nn.attention.varlen`). Where that
is not to be had (fp32, dropout, an older GPU, a CPU) queries, keys and values are laid out with
padding, which is exact for causal attention too, and only what is between the attentions saves the
padding.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe

ATTENTION = "accel_gpt2_causal"

# By transformers' `model_type`: those that tests/train/test_packing.py packs. Another one may keep
# what it is called with from its attention, or see a window only.
PACKED_FAMILIES = ("gpt2", "gpt_neox", "llama")

_HALF = (torch.float16, torch.bfloat16)
_FIRST_WITH_FLASH = (8, 0)  # compute capability: Ampere


class RowDocuments(NamedTuple):
    """Where the documents of a packed row are. A tuple, which checkpointing and dynamo know.

    Attributes:
        starts: int32 [documents + 1], cumulative.
        slots: int64 [num_tokens], of each token in the flattened [documents, longest].
        valid: bool [documents, longest].
    """

    starts: Tensor
    slots: Tensor
    valid: Tensor


def find_documents(position_ids: Tensor, valid: Tensor) -> RowDocuments:
    """From the arrays of `data.batching.PackedBatch`, without waiting for the device."""
    numbers = (position_ids[0] == 0).cumsum(0) - 1
    return RowDocuments(
        starts=F.pad(valid.sum(dim=1).cumsum(0), (1, 0)).int(),
        slots=numbers * valid.shape[1] + position_ids[0],
        valid=valid,
    )


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
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
        return found
    if _has_varlen(query.device) and query.dtype in _HALF and dropout == 0:
        from torch.nn.attention.varlen import varlen_attn

        longest = documents.valid.shape[1]
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
        return out[None], None
    padded, _ = sdpa_attention_forward(
        module,
        *(_with_padding(x, documents) for x in (query, key, value)),
        None,
        scaling=scaling,
        dropout=dropout,
        is_causal=True,
    )
    return padded.flatten(0, 1).index_select(0, documents.slots)[None], None


def _with_padding(packed: Tensor, documents: RowDocuments) -> Tensor:
    """[documents, heads, longest, width] of [1, heads, num_tokens, width], with zeros."""
    tokens = packed[0].transpose(0, 1)
    padded = tokens.new_zeros(documents.valid.numel(), *tokens.shape[1:])
    padded = padded.index_copy(0, documents.slots, tokens)
    return padded.view(*documents.valid.shape, *tokens.shape[1:]).transpose(1, 2)


def _has_varlen(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FIRST_WITH_FLASH


def rows_are_packed(recipe: TrainRecipe, model: Any) -> bool:
    """Whether the recipe's training of this language model packs its rows.

    `auto` packs nothing yet: on a CPU micro batches of neighbouring lengths are as fast
    (docs/log.md), and on a GPU nobody has measured it.

    Args:
        model: of transformers.

    Raises:
        UserError: when the recipe asks for packing and it cannot be had.
    """
    if recipe.packing != "on":
        return False
    reason = ""
    if model.config.model_type not in PACKED_FAMILIES:
        reason = f"{type(model).__name__} is not of a family whose attention was checked " + (
            f"({', '.join(PACKED_FAMILIES)})"
        )
    elif recipe.placement == "shared-base":
        reason = "adapters on a shared base go through in rows of the same shape"
    if reason:
        raise UserError(f"packing = 'on': {reason}; give --set packing=off, or leave it out.")
    return True


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
