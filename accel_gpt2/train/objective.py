"""What the loop trains: a model of transformers, and what it is trained for.

The loop knows a model by this interface alone; `causal`, `masked`, `classifier` and `hybrid` are
what there is behind it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from accel_gpt2.data.batching import Indices
from accel_gpt2.data.quiet import quiet_transformers
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe

# The arrays of a batch by the order in which `forward` takes them.
Batch = tuple[NDArray[Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What one evaluation on validation documents says; `loss_bits` chooses the best checkpoint,
    `values` are for the log."""

    loss_bits: float
    values: dict[str, float]


class TrainedModel(nn.Module, ABC):
    """A model whose forward pass is its loss, and that can score documents.

    What is wrapped for training (DDP, autocast) is this module, so that everything that needs a
    gradient happens inside the wrapped forward pass.
    """

    # What `loss_bits` are: "bits/token" or "bits/document".
    loss_unit: ClassVar[str] = "bits/token"

    # What `score` gives for one document: a number, or one for each class.
    score_shape: tuple[int, ...] = ()

    # Whether `collate` puts a training batch's documents into one row, without padding, and whether
    # attention reads them where they are then.
    packed: bool = False
    flash_packed: bool = False

    def pack_rows(self, recipe: TrainRecipe, device: torch.device) -> None:
        """Settle before a training on a device whether its rows are packed: only a language model's
        can be.

        Raises:
            UserError: when the recipe asks for it and it cannot be had.
        """

    @abstractmethod
    def forward(self, *tensors: Tensor) -> Tensor:
        """The loss summed over the batch's targets in nats, an fp32 scalar."""

    @abstractmethod
    def num_targets(self, lengths: NDArray[Any]) -> Indices:
        """How many targets documents of these lengths have: what the loss of a step is over."""

    @abstractmethod
    def collate(
        self, documents: Sequence[NDArray[Any]], labels: NDArray[np.int64], *, epoch: int
    ) -> Batch:
        """The arrays of a training batch; the same documents of another epoch may give others.

        No document at all gives a batch without targets, for a rank that has nothing to do but
        must take part in the step's collectives.
        """

    @abstractmethod
    def score(self, documents: Sequence[NDArray[Any]], device: torch.device) -> Tensor:
        """float64 nats of each document, [documents] or [documents, num_classes], no gradient."""

    @abstractmethod
    def validation(
        self, scores: NDArray[np.float64], documents: TokenizedDocuments, own: Indices
    ) -> Validation:
        """How good the scores of `documents` are; `own` are those that the model was trained for.

        The loss is not finite where a score of them is not.
        """

    @abstractmethod
    def trainable_state(self) -> dict[str, Tensor]:
        """The trained parameters by name, each tied pair once: what a checkpoint holds."""

    @property
    @abstractmethod
    def finals(self) -> Sequence["TransformersModel"]:
        """What is exported at the end: one model, or one per class."""

    def load_trainable_state(self, state: dict[str, Tensor], source: Path) -> None:
        """Copy the tensors of a checkpoint in place.

        Args:
            source: the checkpoint, for the message.

        Raises:
            UserError: when names or shapes are not this model's.
        """
        own = self.trainable_state()
        for name in sorted(own.keys() | state.keys()):
            if name not in own or name not in state or own[name].shape != state[name].shape:
                raise UserError(
                    f"{source} is not of this model: {name} is {_shape(state.get(name))} there and "
                    f"{_shape(own.get(name))} here. Give --resume with the path of another one, or "
                    "--resume never to start anew (what is there is kept beside)."
                )
            own[name].copy_(state[name])


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


def on_host(batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
    """The arrays as tensors from which a copy to the device need not be waited for."""
    tensors = [torch.from_numpy(array) for array in batch]
    return tuple(x.pin_memory() if device.type == "cuda" else x for x in tensors)


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
    """The arrays as tensors on the device, copied without waiting where the device allows."""
    return tuple(x.to(device, non_blocking=True) for x in on_host(batch, device))


class TransformersModel(TrainedModel):
    """One model of transformers, or its adapter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def transformers_model(self) -> Any:
        """The PreTrainedModel, inside its adapter wrapper if there is one."""
        return self.model.get_base_model() if self._is_adapter else self.model  # type: ignore[operator]

    @property
    def _is_adapter(self) -> bool:
        return hasattr(self.model, "get_base_model")

    @property
    def finals(self) -> Sequence["TransformersModel"]:
        return (self,)

    def trainable_state(self) -> dict[str, Tensor]:
        return {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def save_pretrained(self, directory: Path) -> None:
        """Write the model, or its adapter, as transformers or peft loads it."""
        config = self.transformers_model.config
        config.use_cache = True  # for whoever generates text with it
        # peft would ask the hub whether the embedding has grown; ours never does.
        options = {"save_embedding_layers": False} if self._is_adapter else {}
        with quiet_transformers():
            self.model.save_pretrained(directory, **options)  # type: ignore[operator]
        config.use_cache = False
