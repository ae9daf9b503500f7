"""A masked language model: pseudo-log-likelihoods, and how they are estimated.

The pseudo-log-likelihood of a document is the sum over its tokens of log p(token | all others)
(Salazar et al. 2020, arXiv:1910.14659): one pass for each token. A random fraction of the tokens,
masked at once, gives an estimate in one pass. Comparing classes, the estimate is good only where
all of them are asked about the same tokens.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from accel_gpt2.data.batching import Indices
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.recipe import Pll
from accel_gpt2.train.causal import language_validation
from accel_gpt2.train.objective import Batch, TransformersModel, Validation, to_device


@dataclass(frozen=True, slots=True, kw_only=True)
class PllEstimator:
    """How a document is scored; the random ones mask `mask_fraction` of its tokens `num_samples`
    times and scale the mean up to all of them.

    A mask depends on the seed, the document's own tokens and, for independent ones, on the class;
    so a document has the same score in every batch and on every machine.
    """

    kind: Pll = "full"
    mask_fraction: float = 0.15
    num_samples: int = 1
    seed: int = 0
    class_index: int = 0

    def masks(self, document: NDArray[Any]) -> list[Indices]:
        """The positions that are masked together in each pass over a document."""
        positions = _positions(len(document))
        if self.kind == "full":
            return [positions[i : i + 1] for i in range(len(positions))]
        own = (self.class_index,) if self.kind == "independent" else ()
        random = np.random.default_rng((self.seed, *own, _content(document)))
        return [_draw(random, len(document), self.mask_fraction) for _ in range(self.num_samples)]


def _positions(length: int) -> Indices:
    """What may be masked: the tokens between BOS and EOS, or EOS where there are none."""
    return np.arange(1, max(2, length - 1), dtype=np.int64)


def _num_masked(lengths: NDArray[Any], fraction: float) -> Indices:
    """Tokens masked at once in documents of these lengths.

    >>> _num_masked(np.array([3, 12, 102]), 0.15).tolist()
    [1, 2, 15]
    """
    tokens = np.maximum(1, np.asarray(lengths, dtype=np.int64) - 2)
    return np.maximum(1, np.rint(fraction * tokens).astype(np.int64))


def _draw(random: np.random.Generator, length: int, fraction: float) -> Indices:
    count = int(_num_masked(np.array([length]), fraction)[0])
    return np.sort(random.choice(_positions(length), size=count, replace=False))


def _content(document: NDArray[Any]) -> int:
    digest = hashlib.sha256(np.ascontiguousarray(document, dtype=np.int64).tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


class MaskedLanguageModel(TransformersModel):
    """A masked LM of transformers, trained on masked tokens and scored by `estimator`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        mask_token_id: int,
        pad_token_id: int,
        micro_batch_tokens: int,
        estimator: PllEstimator,
    ) -> None:
        super().__init__(model)
        self.mask_token_id = mask_token_id
        self.pad_token_id = pad_token_id
        self.micro_batch_tokens = micro_batch_tokens
        self.estimator = estimator

    def forward(self, *tensors: Tensor) -> Tensor:
        """Sum of the masked tokens' negative log-likelihood in nats, fp32 scalar.

        Args:
            tensors: input_ids and targets, int64 [documents, longest]; attention_mask and masked,
                bool, same shape.
        """
        input_ids, targets, attention_mask, masked = tensors
        logits = self._logits(input_ids, attention_mask, masked)
        return F.cross_entropy(logits.float(), targets[masked], reduction="sum")

    def _logits(
        self, input_ids: Tensor, attention_mask: Tensor, masked: Tensor, *, fp32_head: bool = False
    ) -> Tensor:
        """Of the masked tokens, [masked, vocab_size].

        Args:
            fp32_head: the head in fp32 whatever the rest is in; a score is a sum over many tokens.
        """
        base = self.transformers_model
        head = getattr(base, "lm_head", None)
        if base.config.model_type != "roberta" or head is None:
            output = base(input_ids=input_ids, attention_mask=attention_mask)
            logits: Tensor = output.logits[masked]
            return logits
        # The head only where something is predicted: it is half of a small model's work.
        output = base.base_model(input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state[masked]
        if not fp32_head:
            predicted: Tensor = head(hidden)
            return predicted
        weights = {name: parameter.float() for name, parameter in head.named_parameters()}
        with torch.autocast(hidden.device.type, enabled=False):
            exact: Tensor = torch.func.functional_call(head, weights, hidden.float())
        return exact

    def num_targets(self, lengths: NDArray[Any]) -> Indices:
        return _num_masked(lengths, self.estimator.mask_fraction)

    def collate(
        self, documents: Sequence[NDArray[Any]], labels: NDArray[np.int64], *, epoch: int
    ) -> Batch:
        masks = []
        for document in documents:
            random = np.random.default_rng((self.estimator.seed, 1 + epoch, _content(document)))
            masks.append(_draw(random, len(document), self.estimator.mask_fraction))
        return self._batch(documents, masks)

    def _batch(self, documents: Sequence[NDArray[Any]], masks: Sequence[Indices]) -> Batch:
        longest = max((len(document) for document in documents), default=2)
        targets = np.full((max(1, len(documents)), longest), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros(targets.shape, dtype=np.bool_)
        masked = np.zeros(targets.shape, dtype=np.bool_)
        attention_mask[len(documents) :] = True  # a row without a document attends to itself
        for row, (document, mask) in enumerate(zip(documents, masks, strict=True)):
            targets[row, : len(document)] = document
            attention_mask[row, : len(document)] = True
            masked[row, mask] = True
        input_ids = np.where(masked, self.mask_token_id, targets)
        return input_ids, targets, attention_mask, masked

    @torch.no_grad()
    def score(self, documents: Sequence[NDArray[Any]], device: torch.device) -> Tensor:
        totals = torch.zeros(len(documents), dtype=torch.float64, device=device)
        for rows, masks, found in self.masked_log_likelihoods(documents, device):
            counts = torch.tensor([len(mask) for mask in masks], device=device)
            weights = torch.tensor(
                [self._weight(documents[row], mask) for row, mask in zip(rows, masks, strict=True)],
                dtype=torch.float64,
                device=device,
            )
            where = torch.tensor(rows, device=device)
            # The size is known here; asked for it, the device would have to finish first.
            rows_of, weights_of = (
                x.repeat_interleave(counts, output_size=len(found)) for x in (where, weights)
            )
            totals.index_add_(0, rows_of, found.double() * weights_of)
        return totals

    @torch.no_grad()
    def masked_log_likelihoods(
        self, documents: Sequence[NDArray[Any]], device: torch.device
    ) -> Iterator[tuple[list[int], list[Indices], Tensor]]:
        """The passes of the estimator: rows of `documents`, what is masked in each of them, and log
        p of these tokens, fp32, one row's after the other's."""
        for rows, masks in self._passes(documents):
            batch = self._batch([documents[row] for row in rows], masks)
            input_ids, targets, attention_mask, masked = to_device(batch, device)
            logits = self._logits(input_ids, attention_mask, masked, fp32_head=True).float()
            yield rows, masks, logits.log_softmax(-1).gather(1, targets[masked][:, None])[:, 0]

    def _weight(self, document: NDArray[Any], mask: Indices) -> float:
        """What one masked token counts: each token once in the sum, or in its estimate."""
        if self.estimator.kind == "full":
            return 1.0
        return len(_positions(len(document))) / (len(mask) * self.estimator.num_samples)

    def _passes(
        self, documents: Sequence[NDArray[Any]]
    ) -> Iterator[tuple[list[int], list[Indices]]]:
        """Rows of `documents` with one mask each, as many as go through at once."""
        longest = max(len(document) for document in documents)
        at_once = max(1, self.micro_batch_tokens // longest)
        masked = [
            (row, mask)
            for row, document in enumerate(documents)
            for mask in self.estimator.masks(document)
        ]
        for start in range(0, len(masked), at_once):
            part = masked[start : start + at_once]
            yield [row for row, _ in part], [mask for _, mask in part]

    def validation(
        self, scores: NDArray[np.float64], documents: TokenizedDocuments, own: Indices
    ) -> Validation:
        return language_validation(scores[own], documents.select(own))
