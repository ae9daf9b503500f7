"""What a memory plan says: bytes by phase and by term."""

from dataclasses import dataclass
from typing import Literal

from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.units import format_bytes

Verdict = Literal["fits", "tight", "does not fit"]
Source = Literal["closed form", "trace"]


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
    where that is not known. `host` is of all processes that train the model, `disk` of
    the one model's files.
    """

    phases: tuple[MemoryPhase, ...]
    reserved: ByteRange
    device: ByteRange
    usable_bytes: int | None
    host: tuple[MemoryTerm, ...]
    disk: tuple[MemoryTerm, ...]
    source: Source

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
        """RAM of the machine for this model."""
        return sum(term.bytes for term in self.host)

    @property
    def disk_bytes(self) -> int:
        """Disk of the run directory at its fullest, with this model alone."""
        return sum(term.bytes for term in self.disk)

    @property
    def verdict(self) -> Verdict:
        """Whether `device` stays within what is usable: all of its range, its middle, or not."""
        if self.usable_bytes is None or self.device.high <= self.usable_bytes:
            return "fits"
        return "tight" if self.device.expected <= self.usable_bytes else "does not fit"

    def advice(self, recipe: TrainRecipe) -> str:
        """One sentence: what to change in this recipe, which the plan is of, to lower the peak."""
        remedies = [(term, _remedy(term.name, recipe)) for term in self.terms]
        possible = [(term, remedy) for term, remedy in remedies if remedy is not None]
        if not possible:
            return f"The peak is at {self.peak.name}; take a smaller model or a larger machine."
        largest, remedy = max(possible, key=lambda pair: pair[0].bytes)
        return (
            f"The peak is at {self.peak.name}, and {format_bytes(largest.bytes)} of it are "
            f"{largest.name}: {remedy}."
        )


def _remedy(term: str, recipe: TrainRecipe) -> str | None:
    """What lowers a term, where this recipe does not do it already.

    Where a term has two remedies, the one that changes the training less.
    """
    pretrained = recipe.init == "pretrained"
    match term:
        case "optimizer state" if recipe.optimizer == "adamw":
            return "give --optimizer adamw_8bit"
        case "optimizer state" | "optimizer temporaries" | "gradients":
            lora_helps = pretrained and recipe.finetuning == "full"
            return "give --finetuning lora" if lora_helps else None
        case "parameters" if pretrained and recipe.finetuning != "qlora":
            return "give --finetuning qlora, or a smaller model"
        case "saved activations" if recipe.checkpointed_layers is not None:
            return f"checkpoint more than {recipe.checkpointed_layers} blocks"
        case "saved activations":
            return "give --gradient-checkpointing"
        case "16-bit copies of weights" | "autocast's cache":
            return "give --mixed-precision pure_bf16"
        case "block inputs" | "recomputed block" | "backward of a block":
            return "halve micro_batch_tokens with --set"
        case "logits of a chunk":
            return "halve loss_chunk_tokens with --set"
        case "logits" | "outputs kept":
            return "train with the chunked loss"
        case "DDP buckets":
            return "train one class per GPU, which exchanges nothing"
    return None
