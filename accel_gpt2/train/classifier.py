"""One model with a classification head: log p(class | document), nothing about the document."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from accel_gpt2.data.batching import Indices
from accel_gpt2.data.quiet import quiet_transformers
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.train.objective import Batch, TransformersModel, Validation, to_device

_NO_LABEL = -100  # torch's own mark of a target that does not count


class DocumentClassifier(TransformersModel):
    """An `AutoModelForSequenceClassification`, decoder or encoder.

    The logits are the library's own: a decoder is read at the last token that is not padding (and
    so not EOS, where that is the padding, as with GPT-2), an encoder at BOS. So what is exported
    classifies alike in plain transformers.
    """

    loss_unit: ClassVar[str] = "bits/document"

    def __init__(self, model: nn.Module, *, pad_token_id: int, is_encoder: bool) -> None:
        super().__init__(model)
        self.pad_token_id = pad_token_id
        self.is_encoder = is_encoder
        self.score_shape = (self.transformers_model.config.num_labels,)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Sum over documents of the label's negative log-probability in nats, fp32 scalar.

        Args:
            tensors: input_ids, int64 [documents, longest]; attention_mask, bool, same shape;
                labels, int64 [documents].
        """
        input_ids, attention_mask, labels = tensors
        logits = self._logits(input_ids, attention_mask)
        return F.cross_entropy(logits, labels, ignore_index=_NO_LABEL, reduction="sum")

    def _logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # A decoder is causal and padded on the right: without a mask it has the fast kernels, and
        # what transformers has to say about that does not hold.
        options = {"attention_mask": attention_mask} if self.is_encoder else {}
        with quiet_transformers():
            logits: Tensor = self.model(input_ids=input_ids, **options).logits
        return logits.float()

    def num_targets(self, lengths: NDArray[Any]) -> Indices:
        return np.ones(np.shape(lengths), dtype=np.int64)

    def collate(
        self, documents: Sequence[NDArray[Any]], labels: NDArray[np.int64], *, epoch: int
    ) -> Batch:
        longest = max((len(document) for document in documents), default=2)
        input_ids = np.full((max(1, len(documents)), longest), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros(input_ids.shape, dtype=np.bool_)
        attention_mask[len(documents) :] = True  # a row without a document attends to itself
        targets = np.full(len(input_ids), _NO_LABEL, dtype=np.int64)
        targets[: len(documents)] = labels
        for row, document in enumerate(documents):
            input_ids[row, : len(document)] = document
            attention_mask[row, : len(document)] = True
        return input_ids, attention_mask, targets

    @torch.no_grad()
    def score(self, documents: Sequence[NDArray[Any]], device: torch.device) -> Tensor:
        """log p(class | document), float64 [documents, num_classes] in nats."""
        batch = self.collate(documents, np.zeros(len(documents), dtype=np.int64), epoch=0)
        input_ids, attention_mask, _ = to_device(batch, device)
        return self._logits(input_ids, attention_mask).double().log_softmax(-1)

    def validation(
        self, scores: NDArray[np.float64], documents: TokenizedDocuments, own: Indices
    ) -> Validation:
        at_label = scores[own, documents.labels[own]]
        bits = -float(at_label.mean()) / math.log(2)
        return Validation(loss_bits=bits, values={"validation_bits_per_document": bits})
