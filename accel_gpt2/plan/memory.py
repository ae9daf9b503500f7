"""What a training needs in memory: on the device in each phase of a step, in RAM and on disk.

Exact arithmetic for GPT-2 language models (`covers`); every other architecture is traced
(`accel_gpt2.trace`), and gives a `MemoryPlan` too. Bytes everywhere.
"""

from dataclasses import dataclass
from typing import Literal

from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.recipe import TrainRecipe

Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTerm:
    """Some bytes, and the sentence that says where they come from."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPhase:
    """All that is allocated at the fullest moment of one phase."""

    name: str
    terms: tuple[MemoryTerm, ...]

    @property
    def bytes(self) -> int:
        """The sum of the terms."""
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """What is expected, and what it may come to instead."""

    low: int
    expected: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What one process of a training needs on its device, and the machine in RAM and on disk.

    `reserved` is what the allocator takes from the driver, `device` what the driver's own tools
    show, contexts and libraries included. `usable_bytes` is what the device has for them, None
    where that is not known. `host` and `disk` are of all processes and classes together.
    """

    phases: tuple[MemoryPhase, ...]
    reserved: ByteRange
    device: ByteRange
    usable_bytes: int | None
    host: tuple[MemoryTerm, ...]
    disk: tuple[MemoryTerm, ...]
    source: Literal["closed form", "trace"]

    @property
    def peak(self) -> MemoryPhase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def terms(self) -> tuple[MemoryTerm, ...]:
        """Of the peak."""
        return self.peak.terms

    @property
    def allocated_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` will say."""
        return self.peak.bytes

    @property
    def host_bytes(self) -> int:
        """RAM of the machine."""
        return sum(term.bytes for term in self.host)

    @property
    def disk_bytes(self) -> int:
        """Disk of the run directory at its fullest."""
        return sum(term.bytes for term in self.disk)

    @property
    def verdict(self) -> Verdict:
        """Whether `device` stays within what is usable: all of its range, its middle, or not."""
        if self.usable_bytes is None or self.device.high <= self.usable_bytes:
            return "fits"
        return "tight" if self.device.expected <= self.usable_bytes else "does not fit"

    @property
    def advice(self) -> str:
        """One sentence: what to change to lower the peak."""
        raise NotImplementedError


def covers(recipe: TrainRecipe, model: ModelSpec) -> bool:
    """Whether the closed form knows this training; else the trace is asked.

    >>> from accel_gpt2.catalog.models import MODELS
    >>> covers(TrainRecipe(), MODELS["gpt2"]), covers(TrainRecipe(), MODELS["roberta-base"])
    (True, False)
    """
    return model.model_type == "gpt2" and recipe.objective in {"generative", "unconditional"}


def plan_memory(
    recipe: TrainRecipe,
    model: ModelSpec,
    profile: HardwareProfile,
    strategy: ShardingStrategy,
    *,
    longest_tokens: int,
    stock_loss: bool = False,
) -> MemoryPlan:
    """Every term of every phase, in well under a millisecond.

    Args:
        profile: the machine; without a GPU the device is its RAM.
        longest_tokens: of the longest document, BOS and EOS included.
        stock_loss: transformers' own loss under accelerate, which is what others train with, in
            place of ours.
    """
    raise NotImplementedError
