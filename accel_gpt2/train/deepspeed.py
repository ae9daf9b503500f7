"""DeepSpeed's ZeRO under our loop: its engine shards the states and steps, all else stays ours."""

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.render.deepspeed import resolved_deepspeed_config
from accel_gpt2.train.backend import Backend
from accel_gpt2.train.objective import TrainedModel
from accel_gpt2.train.optim import build_optimizer
from accel_gpt2.train.processes import current_strategy

# What AdamW keeps for each weight, besides the number of its steps.
_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedBackend(Backend):
    """A model whose states ZeRO shares out among the processes, in host memory where it offloads.

    The engine is called as a library: when a step ends, how the loss is scaled and what learning
    rate it has is the loop's. With bf16 the weights that compute are bf16 themselves, rounded from
    fp32 ones once a step, and so are the gradients of a micro batch, which are added up in fp32
    (`sums_bf16_in_fp32`); elsewhere bf16 is autocast from fp32 weights.
    """

    def __init__(self, accelerator: Any, model: TrainedModel, recipe: TrainRecipe) -> None:
        import deepspeed

        strategy = current_strategy(accelerator)
        config = resolved_deepspeed_config(strategy, recipe)
        if accelerator.device.type == "cpu":
            for offload in ("offload_optimizer", "offload_param"):
                # Memory is pinned for copies to a GPU, and without one this would be compiled.
                config["zero_optimization"].get(offload, {})["pin_memory"] = False
        self.plain_model = model
        self._rank: int = accelerator.process_index
        self._num_ranks: int = accelerator.num_processes
        self._zero3 = strategy.zero_stage == 3
        self._shards_gradients = strategy.shards_gradients
        # A parameter is known by its tensor, until ZeRO gives it another one.
        weights = model.trainable_state()
        trained = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
        self._by_name = {name: trained[tensor.data_ptr()] for name, tensor in weights.items()}
        optimizer = build_optimizer(model, recipe)
        self._in_order = [p for group in optimizer.param_groups for p in group["params"]]
        self._shapes = {parameter: parameter.shape for parameter in self._in_order}
        for parameter in self._in_order:
            # DeepSpeed sends bytes, and there is no view of a scalar as bytes.
            parameter.data = parameter.data.reshape(parameter.shape or (1,))
        self._indices = [group["params"] for group in optimizer.state_dict()["param_groups"]]
        self.model, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config
        )
        self.parameters = (
            self.optimizer.fp32_partitioned_groups_flat
            if self._zero3
            else self.optimizer.single_partition_of_fp32_groups
        )
        self._forget_the_root()
        if recipe.mixed_precision == "bf16":
            if strategy.zero_stage == 1:  # the others are told by their configuration
                self.optimizer.gradient_accumulation_dtype = torch.float32
                self.optimizer.use_grad_accum_attribute = True
            # The engine made its fp32 weights from those that it had rounded to bf16.
            for name, parameter in self._by_name.items():
                self._scatter(parameter, weights[name])

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        self.model.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.model.backward(loss)

    def clip_grad_norm(self, max_norm: float) -> float:
        # The engine clips when it steps, by the norm that it takes then once more.
        self.optimizer.clip_grad = 0.0 if math.isinf(max_norm) else max_norm
        if self._zero3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = float(combine_grad_norm_groups(self.optimizer._get_norm_groups()))
        else:
            norm = float(self.optimizer.scaled_global_norm())
        return norm if norm >= 0 else math.nan  # -1 stands for what is not finite

    def step(self) -> None:
        self.model.step()

    def skip(self) -> None:
        self.model.step()  # by itself it keeps such gradients from the weights, and forgets them
        assert not self.model.was_step_applied()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """Gradients are let go of where ZeRO would share them out, and not exchanged."""
        zero = self.optimizer
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero._grad_acc_hooks.clear()
        forgetting = [
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
            for parameter in self._in_order
            if self._shards_gradients
        ]
        try:
            with self._standing_in() if self._zero3 else contextlib.nullcontext():
                yield
        finally:
            for hook in forgetting:
                hook.remove()
            if self._zero3:
                zero.create_reduce_and_remove_grad_hooks()
            else:
                zero.create_gradient_handling_hooks()

    @contextlib.contextmanager
    def _standing_in(self) -> Iterator[None]:
        """For each sharded weight stands a zero, repeated without memory: it takes its own where it
        is used, as a gathered weight does."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        weights: list[Any] = list(self.plain_model.parameters())
        with self._without_gathering():
            for parameter in weights:
                parameter.data = parameter.data.new_zeros(()).expand(parameter.ds_shape)
                parameter.ds_status = ZeroParamStatus.AVAILABLE
            try:
                yield
            finally:
                self.model._forward_epilogue()  # of a pass that ran out of memory
                for parameter in weights:
                    parameter.data = parameter.data.new_empty(0)
                    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """All weights are whole on every rank, so that none waits for another's passes."""
        if not self._zero3:
            yield
            return
        import deepspeed

        with (
            self._without_gathering(),
            deepspeed.zero.GatheredParameters(list(self.plain_model.parameters())),
        ):
            yield

    @contextlib.contextmanager
    def _without_gathering(self) -> Iterator[None]:
        """ZeRO-3 neither gathers weights for the modules that use them nor lets go of any."""
        offload = self.optimizer.parameter_offload
        offload.partition_all_parameters()
        offload._remove_module_hooks()
        try:
            yield
        finally:
            offload.forward_hooks, offload.backward_hooks = [], []
            offload.setup_zero_stage3_hooks()
            self._forget_the_root()

    def gathered_weights(self) -> dict[str, Tensor]:
        return self._gathered(self._by_name.items())

    def gathered_optimizer_state(self) -> dict[str, Any]:
        own = [self.optimizer.optimizer.state[shard] for shard in self.parameters]
        steps = {float(state["step"]) for state in own if state}
        moments: dict[str, dict[int, Tensor]] = {}
        if steps:
            self._link_moments()
            for key in _MOMENTS:
                moments[key] = self._gathered(enumerate(self._in_order), key)
        if self._rank > 0:
            return {}
        return {
            "state": {
                index: {"step": torch.tensor(step), **{key: moments[key][index] for key in moments}}
                for step in steps
                for index in range(len(self._in_order))
            },
            "param_groups": [
                {**group, "params": indices}
                for group, indices in zip(self.optimizer.param_groups, self._indices, strict=True)
            ],
        }

    def load_optimizer_state(self, saved: Mapping[str, Any]) -> None:
        states = saved["state"]
        if not states:
            return
        step = float(states[0]["step"])
        for shard in self.parameters:
            self.optimizer.optimizer.state[shard] = {
                "step": torch.tensor(step, device=shard.device),
                **{key: torch.zeros_like(shard) for key in _MOMENTS},
            }
        self._link_moments()
        for index, parameter in enumerate(self._in_order):
            for key in _MOMENTS:
                self._scatter(parameter, states[index][key], key)

    def close(self) -> None:
        # The hooks on its gradients would keep the model, and pinned memory stays pinned.
        self.model.destroy()
        if self._zero3:
            from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

            # A method's cache, which the class holds, would keep every model with all its shards.
            cls = coordinator.PartitionedParameterCoordinator
            method = cls._PartitionedParameterCoordinator__params_to_release
            inspect.getclosurevars(method).nonlocals["func"].cache_clear()

    def _link_moments(self) -> None:
        """Have each parameter of ZeRO-1 and 2 know where its moments are."""
        if not self._zero3:
            # DeepSpeed does it when one group has stepped, and the others' are not there yet.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _gathered(
        self, parameters: Iterable[tuple[Any, Tensor]], moment: str | None = None
    ) -> dict[Any, Tensor]:
        """The fp32 weights, or a moment of them, whole, on the CPU of the first rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        gathered = {}
        for key, parameter in parameters:
            if moment is None:
                whole = safe_get_full_fp32_param(parameter)
            else:
                whole = safe_get_full_optimizer_state(parameter, moment)
            if self._rank == 0:
                gathered[key] = whole.reshape(self._shapes[parameter]).to("cpu", copy=True)
        return gathered

    @torch.no_grad()
    def _scatter(self, parameter: Tensor, whole: Tensor, moment: str | None = None) -> None:
        """Set this rank's share of an fp32 weight, or of a moment of it."""
        from deepspeed import utils

        if not self._zero3:
            if moment is None:
                utils.safe_set_full_fp32_param(parameter, whole)
            else:
                utils.safe_set_full_optimizer_state(parameter, whole, moment)
            return
        # Of a parameter that cannot be shared out evenly, DeepSpeed's own would cut too short.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = F.pad(whole.flatten(), (0, size * self._num_ranks - whole.numel()))
        own = padded.view(self._num_ranks, size)[self._rank]
        if moment is None:
            utils.safe_set_local_fp32_param(parameter, own)
        else:
            utils.safe_set_local_optimizer_state(parameter, own, moment)

    def _forget_the_root(self) -> None:
        """ZeRO-3 notes each model in a list, which would keep it when the next one is trained."""
        if self._zero3:
            from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

            FWD_MODULE_STACK.pop()


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None
