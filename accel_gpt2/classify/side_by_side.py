"""Whether trainings side by side on a device are faster than one after another: a measurement."""

# Below this, a second process on a GPU is not worth its memory and its risk. Without MPS, two were
# measured at 0.96 of one after another, with it at 1.14 to 1.24 (prismaquant #283).
WORTHWHILE = 1.1


class Comparison:
    """The tokens/s of trainings alone, each on a device, and then of all of them together.

    It is told when a training starts, and the speed over each of its intervals of steps. An
    interval counts that began when all that have started were training.

    >>> comparison = Comparison()
    >>> comparison.started(0)
    >>> for speed in (5.0, 100.0): comparison.step(0, speed)
    >>> comparison.measures_alone, comparison.speedup
    (False, None)
    >>> comparison.started(1)
    >>> for index in (0, 1, 0, 1, 0): comparison.step(index, 60.0)
    >>> comparison.speedup
    1.2
    """

    def __init__(self) -> None:
        self.speedup: float | None = None  # of all together; None until it is known
        self._alone: float | None = None  # tokens/s
        self._started: set[int] = set()
        self._not_yet: set[int] = set()  # have done no steps since the last one started
        self._began_before: set[int] = set()  # have an interval to end that began before all did
        self._speeds: dict[int, float] = {}

    @property
    def measures_alone(self) -> bool:
        """Whether no more than one training may run on a device for now."""
        return self._alone is None

    def started(self, index: int) -> None:
        """A training begins; what was measured of the others was another situation."""
        self._started.add(index)
        self._not_yet = set(self._started)
        self._began_before.clear()
        self._speeds.clear()

    def step(self, index: int, tokens_per_second: float) -> None:
        """A training has done some steps at this speed."""
        if self._not_yet:
            self._not_yet.discard(index)
            if not self._not_yet:
                self._began_before = self._started - {index}
        elif index in self._began_before:
            self._began_before.remove(index)
        else:
            self._speeds.setdefault(index, tokens_per_second)
        if self._speeds.keys() != self._started:
            return
        together = sum(self._speeds.values())
        if self._alone is not None:
            self.speedup = together / self._alone
        else:
            self._alone = together
            self._not_yet = {_NOBODY}  # until another one starts, there is nothing to compare


_NOBODY = -1
