"""Gradients that are freed as soon as their parameter is stepped (Lv et al. 2023, LOMO).

A step then holds the gradients of the tensors that are being computed, not of all parameters.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.backend import PlainBackend
from accel_gpt2.train.objective import TrainedModel
from accel_gpt2.train.prefetch import Awaited


class GradientReleaser:
    """Steps each parameter of an optimizer in the backward pass, when its gradient is whole.

    A gradient that is not finite changes nothing, but parameters behind it in the backward pass
    have been stepped by then. Norms come from the device one by one, since each decides a step.

    Args:
        optimizer: whose parameters are stepped one at a time; its `step` is not to be called.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._group_numbers = {
            parameter: number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        self._squared_norms: list[float] = []
        self._then: Literal["keep", "step", "forget"] = "keep"
        for parameter in self._group_numbers:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def last_backward(self) -> contextlib.AbstractContextManager[None]:
        """Within it gradients are those of the whole step, so parameters are stepped."""
        return self._with("step")

    def rehearsal(self) -> contextlib.AbstractContextManager[None]:
        """Within it gradients are freed and nothing is stepped."""
        return self._with("forget")

    @contextlib.contextmanager
    def _with(self, then: Literal["step", "forget"]) -> Iterator[None]:
        self._then = then
        try:
            yield
        finally:
            self._then = "keep"

    def grad_norm(self) -> float:
        """The global norm of the gradients that the last backward pass released."""
        norm = math.sqrt(sum(self._squared_norms))
        self._squared_norms.clear()
        return norm

    def _on_gradient(self, parameter: Tensor) -> None:
        if self._then == "keep":
            return
        if self._then == "step":
            self._step(parameter)
        parameter.grad = None

    def _step(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm = float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        self._squared_norms.append(norm**2)
        if math.isfinite(norm):
            groups = self._optimizer.param_groups
            group = groups[self._group_numbers[parameter]]
            self._optimizer.param_groups = [{**group, "params": [parameter]}]
            self._optimizer.step()
            self._optimizer.param_groups = groups


class ReleasingBackend(PlainBackend):
    """One process whose backward pass updates the weights."""

    def __init__(self, accelerator: Any, model: TrainedModel, recipe: TrainRecipe) -> None:
        assert accelerator.num_processes == 1, "plan.support refuses more"
        super().__init__(accelerator, model, recipe)
        self._releaser = GradientReleaser(self._unwrapped)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        with self._releaser.last_backward() if last else contextlib.nullcontext():
            super().backward(loss, last=last)

    def update(self, max_norm: float) -> Awaited:
        """What the norm was: the weights have been stepped, unclipped, as the recipe says."""
        return Awaited(self._releaser.grad_norm())

    def probing(self) -> contextlib.AbstractContextManager[None]:
        return self._releaser.rehearsal()
