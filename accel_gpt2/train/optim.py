"""The optimizer and the learning rate of a step."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from accel_gpt2.catalog.optimizers import OPTIMIZERS
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.bf16 import Bf16Optimizer


def build_optimizer(model: nn.Module, recipe: TrainRecipe) -> Optimizer:
    """The recipe's optimizer over the trainable parameters; matrices decay, vectors do not.

    For bf16 weights it is wrapped, so that rounding does not lose its updates.

    Raises:
        UserError: when the optimizer is bitsandbytes' and that is not installed.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.mixed_precision != "pure_bf16":
        return _of_the_library(groups, recipe)
    return Bf16Optimizer(
        groups,
        lambda groups: _of_the_library(groups, recipe),
        rounding=recipe.bf16_rounding,
        seed=recipe.seed,
    )


def _of_the_library(groups: list[dict[str, Any]], recipe: TrainRecipe) -> Optimizer:
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    match recipe.optimizer:
        case "adamw":
            # Fused exists on CPU and CUDA, is several times faster and needs no temporary.
            return torch.optim.AdamW(
                groups, lr=recipe.learning_rate, betas=betas, eps=recipe.adam_epsilon, fused=True
            )
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=recipe.learning_rate)
        case name:
            try:
                from bitsandbytes import optim
            except ImportError:
                raise UserError(
                    f"optimizer = {name!r} needs bitsandbytes, which is not installed; type "
                    "`pip install bitsandbytes`, or give --optimizer adamw."
                ) from None
            build: Callable[..., Optimizer] = getattr(optim, BITSANDBYTES[name])
            return build(groups, lr=recipe.learning_rate, betas=betas, eps=recipe.adam_epsilon)


# Its classes by our names.
BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "adamw_paged": "PagedAdamW",
    "adamw_8bit_paged": "PagedAdamW8bit",
}


def load_optimizer_state(
    optimizer: Optimizer, saved: Mapping[str, Any], recipe: TrainRecipe
) -> None:
    """Have an optimizer go on from a saved state, whether weights were fp32 or bf16 then."""
    state = saved["state"]
    if recipe.bf16_rounding != "kahan":  # an optimizer keeps, and saves, what it does not know
        state = {
            index: {key: value for key, value in own.items() if key != "compensation"}
            for index, own in state.items()
        }
    # The recipe says how steps are made from here on; the state's own groups would undo a change.
    options = [{k: v for k, v in x.items() if k != "params"} for x in optimizer.param_groups]
    optimizer.load_state_dict({**saved, "state": state})
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    if OPTIMIZERS[recipe.optimizer].paged_tensor_elements:
        _page(optimizer)


def _page(optimizer: Optimizer) -> None:
    """Move a loaded state to paged memory: bitsandbytes leaves it in the GPU's own."""
    plain = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    paging: Any = plain.stepper if isinstance(plain, Bf16Optimizer) else plain
    for parameter, state in plain.state.items():
        for key in ("state1", "state2"):
            buffer = paging.get_state_buffer(parameter, dtype=state[key].dtype)
            state[key] = buffer.copy_(state[key])


def optimizer_state_bytes(parameters: Iterable[Tensor], recipe: TrainRecipe) -> int:
    """What the recipe's optimizer keeps on the device for these trained parameters, from its first
    step on."""
    row = OPTIMIZERS[recipe.optimizer]
    total = 0.0
    for parameter in parameters:
        bf16 = parameter.dtype == torch.bfloat16
        total += row.state_bytes(parameter.shape, bf16=bf16)
        if parameter.is_cuda:
            total -= row.paged_bytes(parameter.shape, bf16=bf16)
        if bf16 and recipe.bf16_rounding == "kahan":
            total += parameter.nbytes
    return round(total)


def learning_rate_at(step: int, total_steps: int, recipe: TrainRecipe) -> float:
    """The learning rate of optimizer step `step` (from 0): warm-up, then the recipe's schedule.

    It counts optimizer steps, whatever the number of processes or accumulated micro batches.

    >>> recipe = TrainRecipe(learning_rate=1.0, warmup_fraction=0.1, lr_schedule="linear")
    >>> [round(learning_rate_at(step, 100, recipe), 2) for step in (0, 9, 10, 99)]
    [0.1, 1.0, 1.0, 0.11]
    """
    warmup_steps = math.ceil(recipe.warmup_fraction * total_steps)
    if step < warmup_steps:
        return recipe.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match recipe.lr_schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1 - progress
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * progress))
    floor = recipe.min_learning_rate_fraction
    return recipe.learning_rate * (floor + (1 - floor) * factor)
