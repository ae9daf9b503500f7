"""Several adapters on one frozen base, trained in one process: in turn, or stacked in one batch.

To the rest of the code the model of a class is a whole model; what is frozen in it is the same
tensors for all classes. docs/benchmarks/2026-11-23-shared-base.md compares the two ways.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from accel_gpt2.data.batching import split_micro_batches
from accel_gpt2.errors import StoppedEarly, UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.backend import MicroBatch
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.checkpoint import TrainState
from accel_gpt2.train.loop import ClassTraining
from accel_gpt2.train.objective import TrainedModel, to_device

Model = TypeVar("Model", bound=nn.Module)


def share_frozen(model: Model) -> Model:
    """A copy that has trained parameters of its own and shares everything frozen, on any device.

    A layer that holds frozen tensors alone is the same object in both: what a library keeps beside
    its weights, such as the scales of a 4-bit one, is there once too.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not any(tensor.requires_grad for tensor in own) and not [*module.children()]:
            memo[id(module)] = module
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.requires_grad:
            memo[id(tensor)] = tensor
    return copy.deepcopy(model, memo)


class Turn:
    """What a class has of its own beside its adapter: random numbers, and a clock.

    Within it (a context manager) they are the class's own; both stand still while it is the turn
    of another class, so a class draws what it would draw alone, and the classes' seconds add up to
    those of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._random_states: list[Tensor] = []
        self._seconds = 0.0
        self._entered: float | None = None

    def __enter__(self) -> "Turn":
        self._entered = time.monotonic()
        if self._random_states:
            torch.set_rng_state(self._random_states[0])
            if self._device.type == "cuda":
                torch.cuda.set_rng_state(self._random_states[1], self._device)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._random_states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            self._random_states.append(torch.cuda.get_rng_state(self._device))
        self._seconds = self.clock()
        self._entered = None

    def clock(self) -> float:
        """Seconds of all turns so far, this one included."""
        here = 0.0 if self._entered is None else time.monotonic() - self._entered
        return self._seconds + here

    def add(self, seconds: float) -> None:
        """Count the class's share of what was computed for several at once."""
        self._seconds += seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The training of one class that goes on beside others: its `train_steps`, and its turn."""

    steps: Generator[MicroBatch, Tensor, TrainState]
    turn: Turn


def train_side_by_side(
    trainings: Iterable[Training],
    *,
    stack: Callable[[Sequence[MicroBatch]], "StackedModels | None"],
    on_finished: Callable[[int, TrainState], None],
    on_failed: Callable[[int, UserError], None],
) -> None:
    """Train several models to their ends, a micro batch of each in turn.

    Args:
        trainings: each is begun before the next one is asked for.
        stack: given the first micro batch of each, what computes several at once from here on; None
            for one after another, which is bit for bit what each of them would be alone.
        on_finished: called with a training's number and final state as soon as it has ended.
        on_failed: called with a training's number and error; the others go on to their ends.

    Raises:
        StoppedEarly: after all of them have saved.
        UserError: at the end, what the first training that failed failed with.
    """
    begun: list[Training] = []
    pending: dict[int, MicroBatch] = {}
    failures: list[UserError] = []
    stops: list[StoppedEarly] = []

    def advance(number: int, loss: Tensor | None = None) -> None:
        """To the training's next micro batch; without the loss of the pending one, through that."""
        training, micro_batch = begun[number], pending.pop(number, None)
        try:
            with training.turn:
                if micro_batch is None:
                    pending[number] = next(training.steps)
                    return
                loss = micro_batch.run() if loss is None else loss
                pending[number] = training.steps.send(loss)
        except StopIteration as finished:
            on_finished(number, finished.value)
        except StoppedEarly as stop:
            stops.append(stop)
        except UserError as error:
            failures.append(error)
            on_failed(number, error)

    for number, training in enumerate(trainings):
        begun.append(training)
        advance(number)
    stacked = stack([*pending.values()]) if len(pending) > 1 else None
    while pending:
        numbers = sorted(pending)
        if stacked is None:
            for number in numbers:
                advance(number)
            continue
        for group in stacked.groups([pending[number] for number in numbers]):
            together = [numbers[i] for i in group]
            started = time.monotonic()
            losses = stacked.run([pending[number] for number in together])
            share = (time.monotonic() - started) / len(together)
            for number, loss in zip(together, losses, strict=True):
                begun[number].turn.add(share)
                advance(number, loss)
    # Of the stops the last: by then all have saved what they had.
    for ending in (*failures, *reversed(stops)):
        raise ending


def why_not_stacked(models: Sequence[TrainedModel], recipe: TrainRecipe) -> str | None:
    """What keeps these models' batches from being computed as one, or None.

    >>> why_not_stacked([], TrainRecipe(finetuning="lora", dropout=0.1))
    'dropout draws other numbers for other batches; --set dropout=0 lora_dropout=0 has none'
    """
    if recipe.dropout > 0 or recipe.lora_dropout > 0:
        return (
            "dropout draws other numbers for other batches; --set dropout=0 lora_dropout=0 has none"
        )
    if any(model.packed for model in models):
        return "packed rows have no shape in common; --set packing=off has rows that do"
    if recipe.release_gradients:
        return "release_gradients steps each class in its own backward pass"
    if not all(isinstance(model, LanguageModel) for model in models):
        return "the heads of masked language models see masked tokens, not rows of a batch"
    if not all(_is_plain_lora(layer) for model in models for _, layer in _adapted_layers(model)):
        return "only LoRA of linear layers is a product that can be stacked"
    return None


def _adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The names and modules of the layers that have an adapter."""
    from peft.tuners.lora import LoraLayer

    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]


def _is_plain_lora(layer: Any) -> bool:
    """A product with A and B beside the layer's own, and nothing else (DoRA is a variant)."""
    is_linear = type(layer).__name__ in {"Linear", "Linear4bit", "Linear8bitLt"}
    return is_linear and not layer.lora_variant and not layer.lora_bias[_ADAPTER]


_ADAPTER = "default"  # what peft calls the only adapter of a model


class StackedModels:
    """Models that differ in their adapters alone, computed as one.

    The rows of a batch are those of the first model, then those of the second, and so on. They go
    through the base together, and through the adapters in one batched product a layer. Each model
    has a loss and gradients of its own, equal to those that it has alone up to rounding.

    Args:
        models: on their device, with no dropout; see `why_not_stacked`.
        accelerator: for its autocast.
        micro_batch_tokens: how many padded tokens may go through at once, as without stacking; so
            it takes no more memory than one model's micro batch.
    """

    def __init__(
        self, models: Sequence[TrainedModel], accelerator: Any, *, micro_batch_tokens: int
    ) -> None:
        self._accelerator = accelerator
        self._micro_batch_tokens = micro_batch_tokens
        self._numbers = {id(model): number for number, model in enumerate(models)}
        joint = share_frozen(models[0])
        assert isinstance(joint, LanguageModel), type(joint)
        self._joint = joint
        self._layers: list[_StackedLora] = []
        for name, _ in _adapted_layers(joint):
            layer = _StackedLora([model.get_submodule(name) for model in models])
            joint.set_submodule(name, layer)
            self._layers.append(layer)

    def groups(self, micro_batches: Sequence[MicroBatch]) -> list[list[int]]:
        """Which micro batches, by their numbers here, go through together: those of like length."""
        shapes = [tuple(item.tensors[0].shape) for item in micro_batches]  # documents x longest
        groups: list[list[int]] = []
        documents = longest = 0
        for number in sorted(range(len(shapes)), key=lambda number: -shapes[number][1]):
            documents = max(documents, shapes[number][0])
            longest = max(longest, shapes[number][1])
            if groups and (len(groups[-1]) + 1) * documents * longest <= self._micro_batch_tokens:
                groups[-1].append(number)
            else:
                groups.append([number])
                documents, longest = shapes[number]
        return groups

    def run(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """The summed losses of micro batches of several models, detached; gradients are in place,
        as after `MicroBatch.run`."""
        if len(micro_batches) == 1:
            return [micro_batches[0].run()]
        numbers = [self._numbers[id(item.backend.plain_model)] for item in micro_batches]
        for layer in self._layers:
            layer.numbers = numbers
        batches = [item.tensors for item in micro_batches]
        with self._accelerator.autocast():
            losses = self._joint.losses_by_group(
                _stack(batches), [len(targets) for _, targets, _ in batches]
            )
        scaled = []
        for loss, item in zip(losses, micro_batches, strict=True):
            scaler = item.backend.scaler  # each model has its own
            scaled.append(loss * item.scale if scaler is None else scaler.scale(loss * item.scale))
        torch.autograd.backward(scaled)
        return [loss.detach() for loss in losses]


def _stack(batches: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """One batch, as `causal.arrays` has it, of all rows, those of each padded with zeros to the
    same number and length."""
    documents = max(len(input_ids) for input_ids, _, _ in batches)
    longest = max(input_ids.shape[1] for input_ids, _, _ in batches)
    padded, moved = [], []
    for number, (input_ids, _, positions) in enumerate(batches):
        rows, width = input_ids.shape
        padded.append(pad(input_ids, (0, longest - width, 0, documents - rows)))
        row = positions // width
        moved.append((number * documents + row) * longest + positions % width)
    return torch.cat(padded), torch.cat([batch[1] for batch in batches]), torch.cat(moved)


class _StackedLora(nn.Module):
    """The adapters of several models on one layer; `numbers` are those whose rows come."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.base_layer = layers[0].base_layer
        self.numbers: list[int] = []
        self._adapters = [  # not registered: they are parameters of the models
            (layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight) for layer in layers
        ]
        self._scaling: float = layers[0].scaling[_ADAPTER]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        down = torch.stack([self._adapters[number][0] for number in self.numbers])
        up = torch.stack([self._adapters[number][1] for number in self.numbers])
        rows = x.to(down.dtype).reshape(len(self.numbers), -1, x.shape[-1])
        added = rows @ down.mT @ up.mT
        return (result + added.view_as(result) * self._scaling).to(result.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class StackTrial:
    """Seconds of the same micro batches, one after another and stacked."""

    in_turn_seconds: float
    stacked_seconds: float

    @property
    def gain(self) -> float:
        """How many times as fast stacked ones are."""
        return self.in_turn_seconds / max(1e-9, self.stacked_seconds)

    @property
    def is_faster(self) -> bool:
        """Clearly so: in doubt one after another, bit for bit what each model is alone."""
        return self.gain > 1.05


def try_stacking(
    stacked: StackedModels, trials: Sequence[Sequence[MicroBatch]], device: torch.device
) -> StackTrial | None:
    """Time both ways on the same micro batches; None where too many tokens keep them apart.

    It changes nothing: gradients are forgotten.

    Args:
        trials: for each, a micro batch of every model, none of which has gradients yet.
    """
    cuts = [stacked.groups(micro_batches) for micro_batches in trials]
    if all(len(group) == 1 for groups in cuts for group in groups):
        return None
    seconds = {"in_turn": 0.0, "stacked": 0.0}
    # The first one twice: at its first time memory is taken and kernels are chosen.
    for number in (-1, *range(len(trials))):
        micro_batches, groups = trials[max(0, number)], cuts[max(0, number)]
        alone = [[i] for i in range(len(micro_batches))]
        for way, parts in (("in_turn", alone), ("stacked", groups)):
            _wait_for(device)
            started = time.monotonic()
            for part in parts:
                stacked.run([micro_batches[i] for i in part])
            _wait_for(device)
            if number >= 0:
                seconds[way] += time.monotonic() - started
    for item in trials[0]:
        item.backend.zero_grad()
    return StackTrial(in_turn_seconds=seconds["in_turn"], stacked_seconds=seconds["stacked"])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def trial_micro_batches(
    job: ClassTraining, recipe: TrainRecipe, first: MicroBatch, device: torch.device
) -> list[MicroBatch]:
    """The first micro batches of three global batches of an epoch, to be tried out.

    Args:
        first: a micro batch of this training.
    """
    batches = job.schedule.epoch(0)
    found = []
    for third in range(3):
        batch = batches[third * len(batches) // 3]
        own, *_ = split_micro_batches(
            job.documents.lengths,
            batch,
            world_size=1,
            micro_batch_tokens=recipe.micro_batch_tokens,
        )[0]
        documents = [job.documents.document(int(index)) for index in own]
        arrays = job.model.collate(documents, job.documents.labels[own], epoch=0)
        found.append(dataclasses.replace(first, tensors=to_device(arrays, device)))
    return found
