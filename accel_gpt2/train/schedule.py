"""Every global batch of a training, reachable at once: a resumed run replays nothing."""

import math
from typing import Any

from numpy.typing import NDArray

from accel_gpt2.data.batching import Indices, epoch_batches
from accel_gpt2.recipe import TrainRecipe


class BatchSchedule:
    """The global batches of one class, by (epoch, batch), and their number.

    Args:
        lengths: tokens of each document, shape [num_documents].
        total_steps: where it is known already, as from a checkpoint; counting takes about a
            third of a second for each million documents and epoch.
    """

    def __init__(
        self, lengths: NDArray[Any], recipe: TrainRecipe, *, total_steps: int | None = None
    ) -> None:
        self._lengths = lengths
        self._recipe = recipe
        self._epochs: dict[int, list[Indices]] = {}
        self.total_steps = self._count_steps() if total_steps is None else total_steps

    def epoch(self, epoch: int) -> list[Indices]:
        """The global batches of an epoch, in order."""
        batches = self._epochs.get(epoch)
        if batches is None:
            batches = epoch_batches(
                self._lengths,
                global_batch_tokens=self._recipe.global_batch_tokens,
                global_batch_size=self._recipe.global_batch_size,
                seed=self._recipe.seed,
                epoch=epoch,
            )
            # The last two: a thread that prepares batches comes to the next epoch before the loop.
            self._epochs = {**dict([*self._epochs.items()][-1:]), epoch: batches}
        return batches

    def _count_steps(self) -> int:
        limit = self._recipe.max_steps or math.inf
        whole_epochs = math.floor(self._recipe.epochs)
        steps = 0
        for epoch in range(whole_epochs):
            steps += len(self.epoch(epoch))
            if steps >= limit:
                return int(limit)
        part = self._recipe.epochs - whole_epochs
        if part > 0:
            last = len(self.epoch(whole_epochs))
            # Rounded first: 1.1 - 1 is a little more than 0.1, and must not cost a step more.
            steps += math.ceil(round(part * last, 6))
        return int(min(steps, limit))
