"""What to change where nothing fits as it was asked for, sorted by how much that changes."""

from collections.abc import Iterator, Sequence

from accel_gpt2.catalog.profiles import PROFILES, HardwareProfile
from accel_gpt2.plan.candidates import CHOICES, pinned
from accel_gpt2.recipe import Layer, TrainRecipe


def changes(
    layers: Sequence[Layer], asked: TrainRecipe, profile: HardwareProfile
) -> Iterator[tuple[Sequence[Layer], HardwareProfile, Sequence[str]]]:
    """Leave out one pinned choice, then all; cut documents shorter; take a larger machine.

    Each with the recipe keys that it changes.
    """
    given = pinned(layers)
    # What changes rounding alone comes before what changes the result.
    for keys in [(key,) for key in reversed(CHOICES) if key in given] + [tuple(given)]:
        yield _without(layers, keys), profile, keys
    max_length = asked.max_length // 2
    while max_length >= _SHORTEST_MAX_LENGTH:
        shorter = Layer(origin="--max-length", values={"max_length": max_length})
        yield [*layers, shorter], profile, ["max_length"]
        max_length //= 2
    larger = [x for x in PROFILES.values() if _memory_bytes(x) > _memory_bytes(profile)]
    for other in sorted(larger, key=_memory_bytes):
        yield layers, other, ()


_SHORTEST_MAX_LENGTH = 128  # tokens; less of a review or of a news text is another data set


def _memory_bytes(profile: HardwareProfile) -> int:
    return 0 if profile.gpu is None else profile.gpu.memory_bytes * profile.num_gpus


def _without(layers: Sequence[Layer], keys: Sequence[str]) -> list[Layer]:
    return [
        Layer(origin=x.origin, values={k: v for k, v in x.values.items() if k not in keys})
        for x in layers
    ]


def typed_option(key: str, value: object) -> str:
    """A recipe value as it is typed after `accel-gpt2 train`.

    >>> typed_option("gradient_checkpointing", False), typed_option("micro_batch_tokens", 1024)
    ('--no-gradient-checkpointing', '--set micro_batch_tokens=1024')
    """
    if key in {"micro_batch_tokens", "checkpointed_layers"}:
        return f"--set {key}={'none' if value is None else value}"
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"
