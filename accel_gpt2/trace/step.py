"""One optimizer step as `train.loop` makes it, without what the loop does around it.

The tracer runs it on fake tensors, the checks of the tracer on a CPU and on a GPU.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn

from accel_gpt2.recipe import MixedPrecision, TrainRecipe
from accel_gpt2.train.released import GradientReleaser

_AUTOCAST: dict[MixedPrecision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(recipe: TrainRecipe, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The recipe's precision for a forward pass."""
    dtype = _AUTOCAST.get(recipe.mixed_precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Callable[[], tuple[Tensor, ...]]],
    recipe: TrainRecipe,
    *,
    num_targets: int,
    scaler: torch.amp.GradScaler | None = None,
    releaser: GradientReleaser | None = None,
    enter_phase: Callable[[str], None] = lambda name: None,
) -> Tensor:
    """Forward and backward passes over the micro batches, clipping, update; the gradients' norm.

    Args:
        model: whose forward pass is the summed loss, on its device.
        micro_batches: each makes its tensors on the device, as `model` takes them.
        num_targets: of all micro batches together.
        scaler: for fp16; None leaves the gradients as they are.
        releaser: of the optimizer, where the recipe releases gradients.
        enter_phase: told when a part begins: "forward", "backward", "optimizer", "between steps".
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    for number, micro_batch in enumerate(micro_batches, start=1):
        enter_phase("forward")
        tensors = micro_batch()
        with autocast(recipe, device):
            loss = model(*tensors)
        enter_phase("backward")
        scaled = loss * (1 / num_targets)
        last = number == len(micro_batches)
        with releaser.last_backward() if releaser and last else contextlib.nullcontext():
            (scaled if scaler is None else scaler.scale(scaled)).backward()
        del loss, scaled  # and their graph
    if releaser is not None:
        enter_phase("between steps")
        return torch.tensor(releaser.grad_norm())
    enter_phase("optimizer")
    if scaler is not None:
        scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm or math.inf)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    enter_phase("between steps")
    return grad_norm


class StockLoss(nn.Module):
    """What plain training code under accelerate does: the library's own loss, all logits in fp32,
    and its output kept until the next one is there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outputs: Any = None

    def forward(self, input_ids: Tensor, *_: Tensor) -> Tensor:
        """The mean loss of next tokens, in nats."""
        outputs = self.model(input_ids=input_ids, labels=input_ids)
        if torch.is_autocast_enabled(input_ids.device.type):
            outputs = convert_to_fp32(outputs)
        self.outputs = outputs
        loss: Tensor = self.outputs.loss
        return loss
