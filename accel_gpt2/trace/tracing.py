"""Trace one training step: in a process of its own, because the pretend device changes torch."""

import copy
import dataclasses
import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from transformers.utils import import_utils

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.trace import pretend
from accel_gpt2.trace.memory import TracedMemory, TraceRequest, normalized
from accel_gpt2.trace.step import StockLoss, autocast, training_step
from accel_gpt2.trace.tracker import MemoryTracker
from accel_gpt2.train.model import build_model, fresh_config
from accel_gpt2.train.objective import TrainedModel, to_device
from accel_gpt2.train.optim import build_optimizer
from accel_gpt2.train.released import GradientReleaser

# The optimizer's state comes with the first step; the second is as all that follow.
_NUM_STEPS = 2

# Traced in place of a deeper model: all blocks but the first and the last are alike.
_THREE, _FOUR = 3, 4

# c10/cuda/CUDACachingAllocator.h: kMinBlockSize. The CPU's profiler reports the bytes asked for.
_ROUNDING_BYTES = {"gpu": 512, "cpu": 1}

_PAD_TOKEN_ID = 1  # of RoBERTa's tokenizers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moment:
    """A stretch of the training; `model` and `block` are None outside of the blocks."""

    step: int
    micro_batch: int
    phase: str
    model: int | None = None
    block: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trace:
    """Bytes: the peak of each moment, and the fields of `TracedMemory` that are sizes."""

    peaks: Mapping[_Moment, int]
    sizes: Mapping[str, int]


def trace(request: TraceRequest) -> TracedMemory:
    """What the request's training holds, from two shallow models where its own is deeper.

    The peak of each moment is an affine function of the depth and, between the first block and the
    last, of the block's number: what comes out is what tracing the deep model would give.

    Raises:
        UserError: when the model cannot be built, or its base is in 4 bits.
    """
    request = normalized(request)
    if request.recipe.finetuning == "qlora":
        raise UserError(
            "A base in 4 bits is not traced: bitsandbytes' weights are tensors of a kind of their "
            "own, which cannot be without contents; plan a GPT-2 language model, or --finetuning "
            "lora."
        )
    config = _config(request)
    n_layer: int = config.num_hidden_layers
    if request.recipe.checkpointed_layers == n_layer:  # all, however deep
        recipe = dataclasses.replace(request.recipe, checkpointed_layers=None)
        request = dataclasses.replace(request, recipe=recipe)
    if request.whole or n_layer <= _FOUR or not _blocks_are_alike(config, request.recipe):
        found = _trace_at_depth(request, config, n_layer)
    else:
        three, four = (_trace_at_depth(request, config, n) for n in (_THREE, _FOUR))
        found = _extrapolated(three, four, n_layer)
    phases: dict[str, int] = {}
    for moment, peak in found.peaks.items():
        phases[moment.phase] = max(phases.get(moment.phase, 0), peak)
    return TracedMemory(phases=phases, **found.sizes)


def _extrapolated(three: _Trace, four: _Trace, n_layer: int) -> _Trace:
    more = n_layer - _FOUR
    last = n_layer - 1
    peaks = {}

    def at(trace: _Trace, moment: _Moment, block: int) -> int:
        return trace.peaks[dataclasses.replace(moment, block=block)]

    for moment, peak in four.peaks.items():
        match moment.block:
            case None:
                peaks[moment] = peak + more * (peak - three.peaks[moment])
            case 0:
                peaks[moment] = peak + more * (peak - at(three, moment, 0))
            case 1:
                second = peak + more * (peak - at(three, moment, 1))
                each = at(four, moment, 2) - peak
                peaks[moment] = second
                peaks[dataclasses.replace(moment, block=last - 1)] = second + (last - 2) * each
            case 3:
                at_last = peak + more * (peak - at(three, moment, 2))
                peaks[dataclasses.replace(moment, block=last)] = at_last
    sizes = {name: size + more * (size - three.sizes[name]) for name, size in four.sizes.items()}
    return _Trace(peaks=peaks, sizes=sizes)


def _blocks_are_alike(config: Any, recipe: TrainRecipe) -> bool:
    if recipe.checkpointed_layers is not None:
        return False
    kinds = [getattr(config, name, None) for name in ("layer_types", "attention_layers")]
    return all(each is None or len(set(each)) == 1 for each in kinds)


def _config(request: TraceRequest) -> Any:
    config = fresh_config(request.recipe, pad_token_id=_pad_token_id(request))
    row = MODELS.get(request.recipe.model)
    config.vocab_size = request.vocab_size or (row or config).vocab_size
    if request.n_layer is not None:
        config.num_hidden_layers = request.n_layer
    return config


def _pad_token_id(request: TraceRequest) -> int | None:
    return _PAD_TOKEN_ID if request.recipe.objective in {"masked_lm", "classification"} else None


def _trace_at_depth(request: TraceRequest, config: Any, n_layer: int) -> _Trace:
    config = copy.deepcopy(config)
    config.num_hidden_layers = n_layer
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:n_layer]
    device = pretend.register()
    if request.device == "cpu":
        device = torch.device("cpu")
    _let_fake_tensors_pass()
    rounding_bytes = _ROUNDING_BYTES[request.device]
    with FakeTensorMode(allow_non_fake_inputs=True):
        with MemoryTracker(device.type, rounding_bytes):  # it answers for tensors without contents
            model = _build(request, config).to(device)
        return _run(request, model, MemoryTracker(device.type, rounding_bytes), device)


def _build(request: TraceRequest, config: Any) -> TrainedModel:
    """The recipe's model with random weights, by way of the configuration's own file."""
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        return build_model(
            dataclasses.replace(request.recipe, model=directory, init="scratch"),
            vocab_size=config.vocab_size,
            eos_token_id=config.vocab_size - 1,
            mask_token_id=config.vocab_size - 2,
            pad_token_id=_pad_token_id(request),
            class_names=[f"class {number}" for number in range(request.num_classes)],
            log_prior=np.full(request.num_classes, -np.log(request.num_classes)),
        )


def _run(
    request: TraceRequest, model: TrainedModel, tracker: MemoryTracker, device: torch.device
) -> _Trace:
    recipe = request.recipe
    if not request.stock_loss:  # which reads padded rows
        model.pack_rows(recipe, device)
    documents, labels = _documents(request)
    marker = _Marker(tracker)
    for number, final in enumerate(model.finals):
        _watch(final.transformers_model, marker, number)

    def micro_batch() -> tuple[Tensor, ...]:
        return to_device(model.collate(documents, labels, epoch=0), device)

    trained = StockLoss(model.finals[0].transformers_model) if request.stock_loss else model
    with unset_fake_temporarily():  # bitsandbytes computes its tables of 8-bit numbers
        optimizer = build_optimizer(model, recipe)
    releaser = GradientReleaser(optimizer) if recipe.release_gradients else None
    static = [*model.parameters(), *model.buffers()]
    with tracker:
        for tensor in static:
            tracker.count(tensor)
        sizes = {"parameters_bytes": tracker.current_bytes}
        for step in range(_NUM_STEPS):
            marker.step, marker.micro_batch = step, -1
            training_step(
                trained,
                optimizer,
                [micro_batch] * request.num_micro_batches,
                recipe,
                num_targets=1,
                releaser=releaser,
                enter_phase=marker.begin,
            )
        marker.begin("evaluation")
        model.eval()
        with autocast(recipe, device):
            model.score(documents, device)
    return _Trace(peaks=tracker.peaks, sizes=sizes | _sizes(model, optimizer, tracker))


class _Marker:
    """Tells the tracker where the training is."""

    def __init__(self, tracker: MemoryTracker) -> None:
        self.step = self.micro_batch = 0
        self._tracker = tracker
        self._part = ""

    @property
    def is_forward(self) -> bool:
        """Whether this is a training's forward pass, and the first one of a checkpointed block."""
        return self._part == "forward"

    def begin(self, part: str) -> None:
        """A part of a step, as `training_step` names them, or the evaluation."""
        self._part = part
        self.micro_batch += part == "forward"
        self.enter(_PHASES[part])

    def enter(self, phase: str, *, model: int | None = None, block: int | None = None) -> None:
        self._tracker.enter_phase(
            _Moment(
                step=self.step,
                micro_batch=self.micro_batch,
                phase=phase,
                model=model,
                block=block,
            )
        )

    def enter_block(self, model: int, block: int) -> None:
        """A block's forward pass begins; within the backward pass it is a checkpoint's second."""
        if self._part != "backward":
            self.enter(_PHASES[self._part], model=model, block=block)

    def leave_blocks(self) -> None:
        """The head and the loss begin."""
        if self._part != "backward":
            self.enter("loss backward" if self._part == "forward" else _PHASES[self._part])


# What the parts of `training_step` are called in a memory plan. Our loss makes its gradients in
# the forward pass, so all between the last block's two passes is one phase.
_PHASES = {
    "forward": "forward",
    "backward": "loss backward",
    "optimizer": "optimizer step",
    "between steps": "checkpoint saving",
    "evaluation": "evaluation",
}


def _watch(model: Any, marker: _Marker, number: int) -> None:
    """Have the marker told when each block of a model of transformers begins, both ways."""
    blocks = _blocks(model)

    def before(index: int, inputs: tuple[Any, ...]) -> None:
        marker.enter_block(number, index)
        if index == 0 and marker.is_forward and inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: marker.enter("embedding backward", model=number))

    def after(index: int, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if marker.is_forward and hidden.requires_grad:
            hidden.register_hook(
                lambda _: marker.enter("block backward", model=number, block=index)
            )
        if index == len(blocks) - 1:
            marker.leave_blocks()

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, inputs, index=index: before(index, inputs))
        block.register_forward_hook(lambda _, __, output, index=index: after(index, output))


def _blocks(model: Any) -> nn.ModuleList:
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    ]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def _documents(request: TraceRequest) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """A full micro batch. An encoder's last document is a token shorter, as there always is one:
    without padding its attention would need no mask."""
    length = request.longest_tokens
    count = max(1, request.recipe.micro_batch_tokens // (length - 1))
    shorter = count > 1 and request.recipe.objective in {"masked_lm", "classification"}
    lengths = [length] * (count - 1) + [length - shorter]
    return [np.full(each, 3) for each in lengths], np.zeros(count, dtype=np.int64)


def _sizes(
    model: TrainedModel, optimizer: torch.optim.Optimizer, tracker: MemoryTracker
) -> dict[str, int]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = {id(leaf): leaf for leaf in tree_leaves(dict(optimizer.state)) if _is_tensor(leaf)}
    return {
        "gradients_bytes": sum(map(tracker.bytes_of, trained)),
        "optimizer_bytes": sum(map(tracker.bytes_of, state.values())),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_trained_parameters": sum(parameter.numel() for parameter in trained),
    }


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class _Generator(torch.Generator):
    """The pretend device has no generator of its own, and fake random numbers need none."""

    def __new__(cls, device: object = None) -> Self:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


def _let_fake_tensors_pass() -> None:
    """Have libraries treat fake tensors as they treat real ones."""
    # transformers takes the branches of torch.compile for them.
    import_utils.is_fake_tensor = lambda tensor: False
    nn.Module._apply = _apply  # type: ignore[method-assign]
    torch.Generator = _Generator  # type: ignore[misc]
    if importlib.util.find_spec("bitsandbytes") is not None:
        from bitsandbytes import functional

        # Paged memory is no tensor of the device, and wants a GPU to be made.
        functional.get_paged = _paged
        functional.fill = functional.prefetch_tensor = lambda *_, **__: None


def _paged(*shape: int, dtype: torch.dtype, device: object) -> Tensor:
    paged = torch.empty(shape, dtype=dtype)
    paged.is_paged = True  # type: ignore[attr-defined]
    return paged


def _apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """`Module._apply` (so `to`, `bfloat16`, ...) with new tensors in place of the old ones.

    torch's own swaps their contents, which fake tensors refuse.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, so that its id stays its own
    for module in self.modules() if recurse else (self,):
        for tensors in cast(list[dict[str, Tensor | None]], [module._parameters, module._buffers]):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    with torch.no_grad():
                        new = function(old)
                    if isinstance(old, nn.Parameter) and new is not old:
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    made[id(old)] = old, new
                tensors[name] = made[id(old)][1]
    return self
