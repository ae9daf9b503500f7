"""One causal LM per class, trained together: to tell the classes apart as well as to model text.

GeDi's loss (Krause et al. 2021, arXiv:2009.06367, equation 7) on a language model per class in
place of control codes in one. For a document of class y with T predicted tokens:

    (1 - w)·(-log p(x|y)) + w·m·(-log softmax_c(s·log p(x|c) / T + log p(c))_y)

w is the recipe's `discriminative_weight`, s a learnt scale, m the mean number of predicted tokens
of a training document: per document the second term counts m tokens, whatever batch it is in.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Tensor, nn

from accel_gpt2.data.batching import Indices, collate
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.train.causal import LanguageModel, arrays, sum_by_document
from accel_gpt2.train.loss import chunked_cross_entropy, chunked_log_likelihoods
from accel_gpt2.train.objective import Batch, TrainedModel, Validation, to_device

_NO_LABEL = -100

# Posteriors of summed likelihoods are calibrated by a factor of about this (docs/log.md), so that
# is where the scale of per-token means begins: at this times a document's tokens.
_FIRST_SCALE_PER_TOKEN = 0.1


class HybridLanguageModels(TrainedModel):
    """The language models of all classes, side by side.

    Args:
        models: one per class; each needs the memory of a training of its own.
        discriminative_weight: w, from 0 (each model for itself) to 1.
        log_prior: log p(c) in nats, [num_classes].
        mean_tokens: m.
    """

    log_prior: Tensor

    def __init__(
        self,
        models: Sequence[LanguageModel],
        *,
        discriminative_weight: float,
        log_prior: NDArray[np.float64],
        mean_tokens: float,
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.discriminative_weight = discriminative_weight
        self.mean_tokens = mean_tokens
        self.score_shape = (len(models),)
        self.register_buffer("log_prior", torch.from_numpy(log_prior), persistent=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_FIRST_SCALE_PER_TOKEN * mean_tokens)))

    @property
    def finals(self) -> Sequence[LanguageModel]:
        return [model for model in self.models if isinstance(model, LanguageModel)]

    def forward(self, *tensors: Tensor) -> Tensor:
        """The loss summed over documents in nats, fp32 scalar.

        The heads' logits exist in chunks only. So a first pass without gradients finds how much
        each document counts under each model, and a second one sums token losses with these
        weights: their gradient is that of the loss.

        Args:
            tensors: input_ids, targets and positions as in `causal.arrays`; labels, int64
                [documents].
        """
        input_ids, targets, positions, labels = tensors
        states = [model.hidden_states(input_ids, positions) for model in self.finals]
        with torch.no_grad():
            likelihoods = torch.stack(
                [
                    sum_by_document(
                        chunked_log_likelihoods(
                            hidden, head.weight, head.bias, targets, model.loss_chunk_tokens
                        ),
                        input_ids,
                        positions,
                    )
                    for model, (hidden, head) in zip(self.finals, states, strict=True)
                ],
                dim=1,
            )
        likelihoods.requires_grad_()
        num_tokens = sum_by_document(torch.ones_like(targets), input_ids, positions)
        loss = self._loss(likelihoods, labels, num_tokens)
        (weights,) = torch.autograd.grad(loss, likelihoods, retain_graph=True)
        # What it adds to the loss is zero, and to the gradient everything but the scale's.
        rows = positions // input_ids.shape[1]
        total = loss
        for index, (model, (hidden, head)) in enumerate(zip(self.finals, states, strict=True)):
            # A likelihood is minus a token's loss, so each loss counts minus the weight.
            surrogate = chunked_cross_entropy(
                hidden,
                head.weight,
                head.bias,
                targets,
                model.loss_chunk_tokens,
                row_weights=-weights[rows, index],
            )
            total = total + (surrogate - surrogate.detach())
        return total.float()

    def _loss(self, likelihoods: Tensor, labels: Tensor, num_tokens: Tensor) -> Tensor:
        known = labels != _NO_LABEL
        at_label = likelihoods.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
        generative = -(at_label * known).sum()
        means = likelihoods / num_tokens.clamp(min=1)[:, None]
        logits = self.log_scale.double().exp() * means + self.log_prior
        discriminative = F.cross_entropy(logits, labels, ignore_index=_NO_LABEL, reduction="sum")
        weight = self.discriminative_weight
        return (1 - weight) * generative + weight * self.mean_tokens * discriminative

    def num_targets(self, lengths: NDArray[Any]) -> Indices:
        return np.asarray(lengths, dtype=np.int64) - 1

    def collate(
        self, documents: Sequence[NDArray[Any]], labels: NDArray[np.int64], *, epoch: int
    ) -> Batch:
        batch = collate(documents)
        targets = np.full(len(batch.input_ids), _NO_LABEL, dtype=np.int64)
        targets[: len(documents)] = labels
        return (*arrays(batch), targets)

    @torch.no_grad()
    def score(self, documents: Sequence[NDArray[Any]], device: torch.device) -> Tensor:
        """log p(document | class), float64 [documents, num_classes] in nats."""
        tensors = to_device(arrays(collate(documents)), device)
        return torch.stack(
            [model.document_log_likelihoods(*tensors) for model in self.finals], dim=1
        )

    def validation(
        self, scores: NDArray[np.float64], documents: TokenizedDocuments, own: Indices
    ) -> Validation:
        num_tokens = documents.lengths[own].astype(np.int64) - 1
        labels = documents.labels[own]
        rows = np.arange(len(own))
        scale = float(self.log_scale.detach().exp())
        log_prior = self.log_prior.cpu().numpy()
        log_p = log_softmax(scale * scores[own] / num_tokens[:, None] + log_prior, axis=1)
        to_bits = 1 / math.log(2)
        language = -scores[own][rows, labels].sum() * to_bits / num_tokens.sum()
        label = -log_p[rows, labels].mean() * to_bits
        weight = self.discriminative_weight
        share = weight * self.mean_tokens * len(own) / num_tokens.sum()
        return Validation(
            loss_bits=float((1 - weight) * language + share * label),
            values={
                "validation_bits_per_token": float(language),
                "validation_bits_per_document": float(label),
                "logit_scale": scale,
            },
        )

    def trainable_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}
