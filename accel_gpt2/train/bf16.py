"""Training whose weights are bf16 and of which no fp32 copy exists.

A bf16 number has 8 significant bits: what is added to it and is under 1/512 of it vanishes when the
sum is rounded to nearest, and that is most of what training adds to a weight. There are two
remedies (Zamirai et al. 2020, arXiv:2010.06192, compare them): to round up or down by chance, so
that the mean is right (Gupta et al. 2015, arXiv:1502.02551), or to keep what was rounded off for
the next time (Kahan 1965). docs/benchmarks/2026-11-23-pure-bf16.md has the curves.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from accel_gpt2.recipe import Bf16Rounding
from accel_gpt2.train.objective import TrainedModel

# Of AdamW's state, what is kept as wide as the weights, as torch does for bf16 weights too.
_MOMENTS = ("exp_avg", "exp_avg_sq")

_DROPPED_BITS = 16  # that fp32 has behind the last bit of bf16


def cast_to_bf16(model: TrainedModel) -> None:
    """Make the weights bf16 in place, those of its transformers alone.

    Buffers stay as they are: rotary frequencies, for one, want fp32. So do a hybrid's own
    parameters, and quantized weights.
    """
    for final in model.finals:
        for parameter in final.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()


def round_stochastically(source: Tensor, target: Tensor, generator: torch.Generator) -> None:
    """Write fp32 numbers into a bf16 tensor, each as one of its two neighbours by chance.

    The nearer one is the likelier, so that the mean is the number itself; what bf16 can hold stays
    as it is. `source` serves as scratch memory and is lost; it needs another 4 bytes an element.
    """
    bits = source.view(torch.int32)
    noise = torch.randint(
        1 << _DROPPED_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    # The carry into the bits that stay comes as often as the dropped bits say: sign and magnitude
    # are apart in a float, so it leads away from zero, and over a power of two to the next one.
    bits.add_(noise).bitwise_and_(-1 << _DROPPED_BITS)
    target.copy_(source)


def seeded_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The random numbers of one step, on a device; another kind of device gives others."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1)
    return torch.Generator(device).manual_seed(int(mixed[0]))


class Bf16Optimizer(Optimizer):
    """Steps bf16 parameters as another optimizer steps fp32 ones.

    One parameter at a time becomes fp32, with its gradient and its moments; the other optimizer
    steps that, and it is written back rounded. Parameters that are fp32 already are stepped in
    place. So nothing of fp32 is left but temporaries of one parameter: 8 bytes an element, and for
    AdamW 16.

    The state is the other optimizer's own, by its names, with AdamW's moments in bf16 (rounded by
    chance, or a beta2 near 1 would stand still), and for kahan `compensation`, bf16: what the
    weight lacks, itself rounded by chance. Random numbers depend on the seed and the step alone, so
    that they are the same on all ranks and after a resume.

    Args:
        build: makes the other optimizer, `stepper`, for groups of parameters.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        build: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        rounding: Bf16Rounding,
        seed: int,
    ) -> None:
        self.stepper = build([{"params": [nn.Parameter(torch.zeros(1))]}])
        self._rounding = rounding
        self._seed = seed
        self._num_steps = 0
        super().__init__([dict(group) for group in groups], self.stepper.defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        generator = functools.cache(
            functools.partial(seeded_generator, self._seed, self._num_steps)
        )
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group, generator(parameter.device))
        self._num_steps += 1

    def _step_one(
        self, whole: Tensor, group: Mapping[str, Any], generator: torch.Generator
    ) -> None:
        own = self.state[whole]
        assert whole.grad is not None
        parameter, gradient = _local(whole), _local(whole.grad)
        moments = {key: value for key, value in own.items() if key in _MOMENTS}
        compensation = own.pop("compensation", None)
        weight = nn.Parameter(parameter.detach().float())
        if compensation is not None:
            weight.add_(compensation)
        weight.grad = gradient.float()

        self.stepper.param_groups = [{**group, "params": [weight]}]
        self.stepper.state[weight] = own | {key: x.float() for key, x in moments.items()}
        self.stepper.step()
        stepped = self.stepper.state.pop(weight)
        self.stepper.param_groups = []
        weight.grad = None  # makes room for the random numbers

        if parameter.dtype != torch.bfloat16:
            own.update(stepped)
            return
        for key in _MOMENTS:
            if key in stepped:
                rounded = moments[key] if key in moments else torch.empty_like(parameter)
                round_stochastically(stepped[key], rounded, generator)
                stepped[key] = rounded
        own.update(stepped)
        if self._rounding == "stochastic":
            round_stochastically(weight.detach(), parameter.detach(), generator)
        else:
            parameter.copy_(weight)
            if compensation is None:
                compensation = torch.empty_like(parameter)
            round_stochastically(weight.detach().sub_(parameter), compensation, generator)
            own["compensation"] = compensation

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "num_steps": self._num_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state of this class, or of the other optimizer where weights were fp32."""
        # torch would cast the whole state to bf16, 8-bit moments too.
        super().load_state_dict({**state_dict, "state": {}})
        self._num_steps = state_dict.get("num_steps", 0)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        groups = [group for group in self.param_groups for _ in group["params"]]
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter, group in zip(numbers, parameters, groups, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = _moved(state_dict["state"][number], parameter, group)


def _local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that is sharded; any other itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _moved(saved: Mapping[str, Any], parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's saved state on its device, and moments as wide as it is."""
    own = _flat(saved)
    for key, value in own.items():
        if isinstance(value, Tensor):
            # Where no fused kernel counts the steps, torch counts them on the CPU.
            device = value.device if key == "step" and not group.get("fused") else parameter.device
            own[key] = value.to(device, parameter.dtype if key in _MOMENTS else value.dtype)
    return own


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state by names alone: bitsandbytes' own nests what it has quantized."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        flat.update(value if isinstance(value, Mapping) else {key: value})
    return flat
