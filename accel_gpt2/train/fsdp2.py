"""FSDP2: every process holds a share of each weight, of its gradient and of its optimizer state.

Accelerate shards the model in place with `torch.distributed.fsdp.fully_shard`: a group for each
block, whose weights are whole while it computes, and one for the rest, embeddings and tied head,
which stay whole from a forward pass to the end of its backward pass. Gradients are exchanged after
every micro batch, so that none is ever kept whole.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.backend import Backend
from accel_gpt2.train.masked import MaskedLanguageModel
from accel_gpt2.train.objective import TrainedModel
from accel_gpt2.train.optim import build_optimizer, load_optimizer_state


class Fsdp2Backend(Backend):
    """A model sharded over all processes, and the recipe's optimizer of the shards."""

    def __init__(self, accelerator: Any, model: TrainedModel, recipe: TrainRecipe) -> None:
        self._accelerator = accelerator
        self._recipe = recipe
        self.plain_model = model
        # The config file names GPT-2's; this goes for whatever the recipe trains.
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = _block_classes(model)
        self.model, self.optimizer = accelerator.prepare(model, build_optimizer(model, recipe))
        # It calls blocks, which gather what they need, but is no forward pass of the root.
        register_fsdp_forward_method(model, "score")
        self._groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._shards = [x for x in model.parameters() if x.requires_grad]
        self.parameters = [_local(shard) for shard in self._shards]
        self.scaler = accelerator.scaler
        if self.scaler is not None:  # the accelerator has one for all classes
            fresh = torch.amp.GradScaler(accelerator.device.type)
            self.scaler.load_state_dict(fresh.state_dict())

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._accelerator.backward(loss)

    def clip_grad_norm(self, max_norm: float) -> float:
        norm = self._accelerator.clip_grad_norm_(self._shards, max_norm)
        return float(_whole(norm))

    def step(self) -> None:
        self.optimizer.step()

    def skip(self) -> None:
        if self.scaler is not None:
            self.optimizer.step()  # the scaler keeps it from the weights, and halves its scale

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        for group in self._groups:
            group.set_custom_all_gather(_AllGatherAlone())
            group.set_custom_reduce_scatter(_ReduceScatterAlone())
        try:
            yield
        except BaseException:
            self.model.reset_iter_state()  # the pass was left in its middle
            raise
        finally:
            for group in self._groups:
                group.set_custom_all_gather(DefaultAllGather())
                group.set_custom_reduce_scatter(DefaultReduceScatter())

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        # It makes as many passes as a rank's documents ask for, so the ranks would not meet.
        apart = isinstance(self.plain_model, MaskedLanguageModel)
        _, *blocks = self._groups
        if apart:
            for group in self._groups:
                group.unshard()
            for block in blocks:
                block.set_reshard_after_forward(False)
        try:
            yield
        finally:
            if apart:
                for block in blocks:
                    block.set_reshard_after_forward(True)
            self._reshard()

    def _reshard(self) -> None:
        """Have the parameters be shards: a pass without backward leaves the root's whole."""
        for group in self._groups:
            group.reshard()

    def gathered_weights(self) -> dict[str, Tensor]:
        self._reshard()
        return self._gathered(self.plain_model.trainable_state())

    def gathered_optimizer_state(self) -> dict[str, Any]:
        saved = self.optimizer.state_dict()
        shards = self._shards_in_order()
        state = {
            index: self._gathered({key: _as_shard(x, shards[index]) for key, x in own.items()})
            for index, own in saved["state"].items()
        }
        return {**saved, "state": state} if self._accelerator.is_main_process else {}

    def _gathered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """All that is a shard whole, in the first process's host memory, one after another."""
        gathered = {}
        for name, value in values.items():
            whole = _whole(value)
            if self._accelerator.is_main_process:
                gathered[name] = whole.cpu() if isinstance(whole, Tensor) else whole
        return gathered

    def load_optimizer_state(self, saved: Mapping[str, Any]) -> None:
        shards = self._shards_in_order()
        state = {
            index: {key: self._share(x, shards[index]) for key, x in own.items()}
            for index, own in saved["state"].items()
        }
        load_optimizer_state(self.optimizer, {**saved, "state": state}, self._recipe)

    def _share(self, value: Any, shard: DTensor) -> Any:
        """This rank's share of a moment that all ranks have read whole; anything else as it is."""
        if not isinstance(value, Tensor) or value.shape != shard.shape:
            return value
        share = distribute_tensor(
            value.to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None
        )
        return share.to_local() if self._recipe.mixed_precision == "pure_bf16" else share

    def _shards_in_order(self) -> list[DTensor]:
        return [shard for group in self.optimizer.param_groups for shard in group["params"]]


def _block_classes(model: TrainedModel) -> list[str]:
    """The classes of the layers that a model repeats, such as GPT2Block.

    What transformers says must not be split has embeddings among it, which a head may be tied to.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = {type(block).__name__ for layers in lists for block in layers}
    return sorted(blocks - {type(final).__name__ for final in model.finals})


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _as_shard(value: Any, shard: DTensor) -> Any:
    """A moment that an optimizer keeps as a plain tensor, of its own share, as what it is."""
    local = shard.to_local()
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.shape != local.shape:
        return value
    return DTensor.from_local(
        value, shard.device_mesh, shard.placements, shape=shard.shape, stride=shard.stride()
    )


class _AllGatherAlone(DefaultAllGather):
    """Memory is used as ever, and nobody waits: this rank's share stands for the others'."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        async_op: bool = False,
    ) -> None:
        for rank, share in enumerate(output_tensor.chunk(group.size())):
            if rank != group.rank():  # the input lies in its place
                share.copy_(input_tensor)


class _ReduceScatterAlone(DefaultReduceScatter):
    def __call__(  # type: ignore[override]
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])
