"""How one model is trained over the processes of a launch: what differs between strategies inside
the loop, and nothing else."""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.objective import TrainedModel
from accel_gpt2.train.optim import build_optimizer, load_optimizer_state
from accel_gpt2.train.prefetch import Awaited
from accel_gpt2.train.processes import current_strategy


class Backend(ABC):
    """A model and its optimizer, spread over the processes of a launch.

    Every method is called on all ranks together. What is saved is whole and on the first rank, in
    the form of one process: a run goes on under another strategy, or with another number of
    processes.

    Attributes:
        model: wrapped; its forward pass is the loss summed over this rank's targets.
        plain_model: what it wraps. Its parameters may be shards, or empty, between steps.
        optimizer: steps with the learning rates in its `param_groups`.
        parameters: the trained ones, what of them this rank's optimizer steps.
        scaler: fp16's loss scaler where the loop has to know of it, else None.
    """

    model: Any
    plain_model: TrainedModel
    optimizer: Any
    parameters: list[Tensor]
    scaler: Any = None

    def run(self, tensors: tuple[Tensor, ...], *, scale: float, last: bool) -> Tensor:
        """Forward and backward pass of one micro batch; its summed loss, detached.

        Args:
            scale: what the loss is multiplied with before its gradients are averaged over ranks.
            last: whether the step ends here; before that, gradients are only added up.
        """
        with self.accumulating(last=last):
            loss: Tensor = self.model(*tensors)
            self.backward(loss * scale, last=last)
        return loss.detach()

    @abstractmethod
    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a forward and backward pass: whether ranks exchange gradients in it."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the loss's gradients to those of the step."""

    def update(self, max_norm: float) -> Awaited:
        """Clip the gradients, update the weights and forget the gradients, whose global norm is
        returned: over all shards, the same on every rank.

        Where it is not finite, weights and optimizer state stay as they are.
        """
        norm = self.clip_grad_norm(max_norm)
        if math.isfinite(norm):
            self.step()
        else:
            self.skip()
        self.zero_grad()
        return Awaited(norm)

    @abstractmethod
    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale the gradients down to a global norm of at most `max_norm`, and return what the norm
        was: over all shards, the same on every rank. It waits for the device."""

    @abstractmethod
    def step(self) -> None:
        """Update the weights."""

    @abstractmethod
    def skip(self) -> None:
        """Leave weights and optimizer state as they are: the gradients are not finite."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Forget the gradients."""

    def probing(self) -> contextlib.AbstractContextManager[Any]:
        """Within it a forward and backward pass of `plain_model` takes as much memory as one of
        the training, and waits for no other rank, which may have run out of its own."""
        return contextlib.nullcontext()

    @abstractmethod
    def scoring(self) -> contextlib.AbstractContextManager[Any]:
        """Within it `plain_model` can score documents."""

    @abstractmethod
    def gathered_weights(self) -> dict[str, Tensor]:
        """`plain_model.trainable_state()`, whole, on the first rank; {} on the others."""

    @abstractmethod
    def gathered_optimizer_state(self) -> dict[str, Any]:
        """The `state_dict` of `build_optimizer`'s own optimizer, whole, on the first rank."""

    @abstractmethod
    def load_optimizer_state(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `gathered_optimizer_state` gave, on any strategy."""

    def close(self) -> None:  # noqa: B027 -- most have nothing to do
        """Let go of what would outlive the training of this model; nothing of it is used again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The next thing that this rank has to compute for a model: see `Backend.run`."""

    backend: Backend
    tensors: tuple[Tensor, ...]
    scale: float
    last: bool

    def run(self) -> Tensor:
        """Its summed loss, detached; the gradients are where the optimizer looks for them."""
        return self.backend.run(self.tensors, scale=self.scale, last=self.last)


_SKIPS_ON_DEVICE = "_step_supports_amp_scaling"


class PlainBackend(Backend):
    """The whole model in every process: one alone, or several that average gradients (DDP)."""

    def __init__(self, accelerator: Any, model: TrainedModel, recipe: TrainRecipe) -> None:
        self._accelerator = accelerator
        self._recipe = recipe
        self.plain_model = model
        self.model, self.optimizer = accelerator.prepare(model, build_optimizer(model, recipe))
        self.parameters = [x for x in model.parameters() if x.requires_grad]
        self.scaler = accelerator.scaler
        # The accelerator has one for all classes, and none of them may depend on the one before.
        if self.scaler is not None:
            fresh = torch.amp.GradScaler(accelerator.device.type)
            self.scaler.load_state_dict(fresh.state_dict())
        # Accelerate's wrapper looks for a package on the disk and inspects a signature, each step.
        self._unwrapped = self.optimizer.optimizer
        # torch's fused optimizers read on the device whether to step, as its loss scaler has it.
        self._skips_on_device = getattr(self._unwrapped, _SKIPS_ON_DEVICE, False)

    def update(self, max_norm: float) -> Awaited:
        if not self._skips_on_device:
            return super().update(max_norm)
        norm = self._accelerator.clip_grad_norm_(self.parameters, max_norm)
        if self.scaler is None:
            self._unwrapped.found_inf = norm.isfinite().logical_not().float()
            self._unwrapped.step()
        else:
            self.optimizer.step()
        self.zero_grad()
        return Awaited(norm)

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        no_sync: contextlib.AbstractContextManager[Any] = self._accelerator.no_sync(self.model)
        return contextlib.nullcontext() if last else no_sync

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._accelerator.backward(loss)

    def clip_grad_norm(self, max_norm: float) -> float:
        return float(self._accelerator.clip_grad_norm_(self.parameters, max_norm))

    def step(self) -> None:
        self.optimizer.step()

    def skip(self) -> None:
        if self.scaler is not None:
            self.optimizer.step()  # the scaler keeps it from the weights, and halves its scale

    def zero_grad(self) -> None:
        self._unwrapped.zero_grad()

    def scoring(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def gathered_weights(self) -> dict[str, Tensor]:
        return self.plain_model.trainable_state() if self._accelerator.is_main_process else {}

    def gathered_optimizer_state(self) -> dict[str, Any]:
        return dict(self.optimizer.state_dict()) if self._accelerator.is_main_process else {}

    def load_optimizer_state(self, saved: Mapping[str, Any]) -> None:
        load_optimizer_state(self.optimizer, saved, self._recipe)


def build_backend(accelerator: Any, model: TrainedModel, recipe: TrainRecipe) -> Backend:
    """The model, its optimizer built and both prepared, under the strategy of this launch."""
    match current_strategy(accelerator).backend:
        case "fsdp2":
            from accel_gpt2.train.fsdp2 import Fsdp2Backend

            return Fsdp2Backend(accelerator, model, recipe)
        case "deepspeed":
            from accel_gpt2.train.deepspeed import DeepSpeedBackend

            return DeepSpeedBackend(accelerator, model, recipe)
        case _ if recipe.release_gradients:
            from accel_gpt2.train.released import ReleasingBackend

            return ReleasingBackend(accelerator, model, recipe)
        case _:
            return PlainBackend(accelerator, model, recipe)
