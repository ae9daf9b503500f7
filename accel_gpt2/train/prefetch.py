"""The next batches are made while the device computes, and what it computed is read late."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from accel_gpt2.data.batching import Indices, split_micro_batches
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.objective import TrainedModel, on_host
from accel_gpt2.train.schedule import BatchSchedule

_Item = TypeVar("_Item")

# One is copied to the device, the next one waits; more would only hold memory.
_AHEAD = 2


def ahead(items: Iterator[_Item], *, depth: int = _AHEAD) -> Iterator[_Item]:
    """The same items in the same order, made by a thread up to `depth` of them before their time.

    What making an item raises is raised in its place. The thread ends with the last item, or when
    this iterator is closed or forgotten; nobody waits for it, even at the end of the process, since
    a disk may be why a training is given up.

    >>> list(ahead(iter("abc")))
    ['a', 'b', 'c']
    """
    end: Any = object()
    room = threading.Semaphore(depth)
    closed = threading.Event()
    made: SimpleQueue[Future[Any]] = SimpleQueue()

    def make() -> None:
        while room.acquire() and not closed.is_set():
            outcome: Future[Any] = Future()
            try:
                outcome.set_result(next(items, end))
            except BaseException as error:  # also an exit, which is the loop's to make
                outcome.set_exception(error)
            made.put(outcome)

    threading.Thread(target=make, name="prefetch", daemon=True).start()
    try:
        while (item := made.get().result()) is not end:
            room.release()
            yield item
    finally:
        closed.set()
        room.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedMicroBatch:
    """A micro batch of this rank, and what the loop has to know of its global batch.

    Attributes:
        documents: their indices in the class.
        tensors: on the host, as `TrainedModel.forward` takes them; for a GPU in pinned memory.
        last: of the global batch.
        batch_tokens, batch_targets: of the global batch, over all ranks.
    """

    documents: Indices
    tensors: tuple[Tensor, ...]
    last: bool
    batch_tokens: int
    batch_targets: int


def micro_batches_from(
    epoch: int,
    batch: int,
    *,
    num_steps: int,
    schedule: BatchSchedule,
    documents: TokenizedDocuments,
    model: TrainedModel,
    recipe: TrainRecipe,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[PreparedMicroBatch]:
    """What a rank computes in `num_steps` steps from a place in the schedule on, in order.

    A global batch comes in as many micro batches as the memory asks for. It reads documents and
    draws no random number, so a thread may run it beside the training.
    """
    lengths = documents.lengths
    num_targets = model.num_targets(lengths)
    for _ in range(num_steps):
        whole = schedule.epoch(epoch)[batch]
        steps = split_micro_batches(
            lengths,
            whole,
            world_size=world_size,
            micro_batch_tokens=recipe.micro_batch_tokens,
            packed=model.packed,
        )
        for number, per_rank in enumerate(steps, start=1):
            own = per_rank[rank]
            tokens = [documents.document(int(index)) for index in own]
            yield PreparedMicroBatch(
                documents=own,
                tensors=on_host(model.collate(tokens, documents.labels[own], epoch=epoch), device),
                last=number == len(steps),
                batch_tokens=int((lengths[whole] - 1).sum()),
                batch_targets=int(num_targets[whole].sum()),
            )
        batch += 1
        if batch == len(schedule.epoch(epoch)):
            epoch, batch = epoch + 1, 0


class Awaited:
    """A number that a device may still have to compute.

    To read it waits for what was queued before it, not for what was queued after it: `float` of a
    tensor on a GPU waits for both.
    """

    def __init__(self, number: Tensor | float) -> None:
        self._event: torch.cuda.Event | None = None
        if isinstance(number, Tensor) and number.is_cuda:
            number = number.detach().to("cpu", non_blocking=True)  # to pinned memory
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        self._number = number

    def read(self) -> float:
        """The number, as soon as it is there."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._number)
