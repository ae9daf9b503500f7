"""What a person sees while several models train at once: a bar for each, or plain lines in turn."""

from rich.progress import TaskID

from accel_gpt2.train.progress import TrainProgress


class PlacedProgress(TrainProgress):
    """A `TrainProgress` for each of several trainings, in one display."""

    def __init__(self, *, shown: bool, quiet: bool) -> None:
        super().__init__(shown=shown, quiet=quiet)
        self._shown_index: int | None = None
        self._others: dict[int, tuple[TaskID | None, float]] = {}

    def show(self, index: int) -> None:
        """What is called next is about this training."""
        if index == self._shown_index:
            return
        if self._shown_index is not None:
            self._others[self._shown_index] = (self._task, self._last_plain)
        self._shown_index = index
        self._task, self._last_plain = self._others.pop(index, (None, 0.0))

    def update(self, description: str, completed: int, total: int, facts: str) -> None:
        if facts and self._live:  # below the bars, where nothing else says whose they are
            facts = f"{description}: {facts}"
        super().update(description, completed, total, facts)

    def end(self, index: int) -> None:
        """A training has ended; its bar goes."""
        self.show(index)
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task, self._shown_index = None, None
