"""A causal language model: log p(document) from left to right."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from accel_gpt2.data.batching import Indices, PackedBatch, TokenBatch, collate, pack
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.plan.packing import GROUP_PADDING
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.loss import chunked_cross_entropy, chunked_log_likelihoods
from accel_gpt2.train.objective import Batch, TransformersModel, Validation, to_device
from accel_gpt2.train.packing import (
    RowDocuments,
    reads_rows,
    rows_are_packed,
    use_causal_attention,
)


class LanguageModel(TransformersModel):
    """A causal LM of transformers whose forward pass returns the summed loss, never the logits."""

    def __init__(self, model: nn.Module, loss_chunk_tokens: int) -> None:
        super().__init__(model)
        self.loss_chunk_tokens = loss_chunk_tokens
        use_causal_attention(self.transformers_model)

    def pack_rows(self, recipe: TrainRecipe, device: torch.device) -> None:
        self.packed = rows_are_packed(recipe, self.transformers_model)
        self.flash_packed = self.packed and reads_rows(recipe, self.transformers_model, device)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Sum of the valid targets' negative log-likelihood in nats, fp32 scalar.

        Args:
            tensors: see `arrays` and `packed_arrays`.
        """
        input_ids, targets, positions, *row = tensors
        hidden, head = self.hidden_states(input_ids, positions, *row)
        return chunked_cross_entropy(
            hidden, head.weight, head.bias, targets, self.loss_chunk_tokens
        )

    def losses_by_group(self, tensors: Sequence[Tensor], sizes: list[int]) -> list[Tensor]:
        """What `forward` gives for each group of targets, so many of them in order."""
        input_ids, targets, positions = tensors
        hidden, head = self.hidden_states(input_ids, positions)
        groups = zip(torch.split(hidden, sizes), torch.split(targets, sizes), strict=True)
        return [
            chunked_cross_entropy(rows, head.weight, head.bias, wanted, self.loss_chunk_tokens)
            for rows, wanted in groups
        ]

    def hidden_states(
        self, input_ids: Tensor, positions: Tensor, *packed: Tensor
    ) -> tuple[Tensor, nn.Linear]:
        """What the head is applied to, [num_targets, n_embd], and the head."""
        base = self.transformers_model
        row: dict[str, Any] = {}
        if packed:
            position_ids, starts, slots, *groups = packed
            documents = RowDocuments(
                starts=starts, slots=slots, groups=tuple(groups), flash=self.flash_packed
            )
            row = {"position_ids": position_ids, "documents": documents}
        # No attention mask: with right padding causal attention alone is exact, and the kernels
        # for is_causal are the fast ones.
        hidden = base.base_model(input_ids=input_ids, use_cache=False, **row).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, positions), base.get_output_embeddings()

    @torch.no_grad()
    def token_log_likelihoods(
        self, input_ids: Tensor, targets: Tensor, positions: Tensor, *row: Tensor
    ) -> Tensor:
        """log p of each target in nats, fp32, one document's after the other's."""
        hidden, head = self.hidden_states(input_ids, positions, *row)
        return chunked_log_likelihoods(
            hidden, head.weight, head.bias, targets, self.loss_chunk_tokens
        )

    @torch.no_grad()
    def document_log_likelihoods(
        self, input_ids: Tensor, targets: Tensor, positions: Tensor
    ) -> Tensor:
        """log p(document) of each row in nats, float64 [documents]; arguments as in `forward`."""
        per_token = self.token_log_likelihoods(input_ids, targets, positions)
        return sum_by_document(per_token, input_ids, positions)

    def num_targets(self, lengths: NDArray[Any]) -> Indices:
        return np.asarray(lengths, dtype=np.int64) - 1

    def collate(
        self, documents: Sequence[NDArray[Any]], labels: NDArray[np.int64], *, epoch: int
    ) -> Batch:
        if self.packed:
            padding = math.inf if self.flash_packed else GROUP_PADDING
            return packed_arrays(pack(documents, group_padding=padding))
        return arrays(collate(documents))

    def score(self, documents: Sequence[NDArray[Any]], device: torch.device) -> Tensor:
        return self.document_log_likelihoods(*to_device(arrays(collate(documents)), device))

    @torch.no_grad()
    def score_tokens(
        self, documents: Sequence[NDArray[Any]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """What `score` gives, and the fp32 log-likelihoods that it sums, document by document."""
        input_ids, targets, positions = to_device(arrays(collate(documents)), device)
        per_token = self.token_log_likelihoods(input_ids, targets, positions)
        return sum_by_document(per_token, input_ids, positions), per_token

    def validation(
        self, scores: NDArray[np.float64], documents: TokenizedDocuments, own: Indices
    ) -> Validation:
        return language_validation(scores[own], documents.select(own))


def language_validation(scores: NDArray[np.float64], documents: TokenizedDocuments) -> Validation:
    """Bits per token and per byte of the documents that a language model was trained for."""
    bits = -float(scores.sum()) / math.log(2)
    bits_per_token = bits / int((documents.lengths - 1).sum())
    return Validation(
        loss_bits=bits_per_token,
        values={
            "validation_bits_per_token": bits_per_token,
            "validation_bits_per_byte": bits / max(1, int(documents.num_bytes.sum())),
        },
    )


def sum_by_document(per_token: Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
    """Sums of the targets' values, float64 [documents]."""
    totals = torch.zeros(len(input_ids), dtype=torch.float64, device=per_token.device)
    return totals.index_add_(0, positions // input_ids.shape[1], per_token.double())


def arrays(batch: TokenBatch) -> Batch:
    """As `LanguageModel.forward` takes them: input_ids, [documents, longest]; targets and their
    positions in the flattened input_ids, [num_targets]; all int64.

    Where the targets are is found out here: a device that is asked for the true ones of a mask has
    to finish all that is queued before it can say how many there are.
    """
    return batch.input_ids, batch.targets[batch.valid], np.flatnonzero(batch.valid)


def packed_arrays(batch: PackedBatch) -> Batch:
    """As `LanguageModel.forward` takes them: those of `arrays`, documents being one row; and
    position_ids, starts, slots and all groups of the batch."""
    positions = np.arange(len(batch.targets))
    found: tuple[NDArray[Any], ...] = (batch.input_ids, batch.targets, positions)
    return (*found, batch.position_ids, batch.starts, batch.slots, *batch.groups)
