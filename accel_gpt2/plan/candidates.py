"""What a search chooses among: recipes by faithfulness, ways to cut their steps, and ways to spread
them over GPUs."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import STRATEGIES, ShardingStrategy
from accel_gpt2.errors import UsageError
from accel_gpt2.plan.packing import packs_rows
from accel_gpt2.plan.placement import Placement, applicable_placements
from accel_gpt2.recipe import Layer, ResolvedRecipe, TrainRecipe
from accel_gpt2.recipe.resolving import resolve

# faithful: what changes least about full fine-tuning with fp32 weights. quality: fp32 arithmetic
# before that. speed: the fastest. memory: the smallest.
Preference = Literal["faithful", "speed", "memory", "quality"]

# The first three change the result; the others change how its steps are cut.
RESULT_CHOICES = ("finetuning", "mixed_precision", "optimizer")
RUN_CHOICES = ("gradient_checkpointing", "checkpointed_layers", "micro_batch_tokens")
CHOICES = (*RESULT_CHOICES, *RUN_CHOICES)

# The recipe's own default, which is enough to keep a CPU or a small model busy.
_ALWAYS_TRIED_TOKENS = TrainRecipe().micro_batch_tokens

# Without it nearly every half of a batch would be a little too small for its part.
_ROOM = 1.25

_WORDS: Mapping[str, Mapping[object, str]] = MappingProxyType(
    {
        "finetuning": {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"},
        "mixed_precision": {
            "no": "fp32",
            "fp16": "fp16",
            "bf16": "bf16",
            "pure_bf16": "pure bf16",
        },
        "optimizer": {
            "adamw": "AdamW",
            "adamw_8bit": "8-bit AdamW",
            "adamw_paged": "paged AdamW",
            "adamw_8bit_paged": "paged 8-bit AdamW",
            "adafactor": "Adafactor",
        },
    }
)


def describe_choice(values: Mapping[str, object]) -> str:
    """What changes the result, in the field's words.

    >>> describe_choice({"finetuning": "full", "mixed_precision": "bf16", "optimizer": "adamw"})
    'full fine-tuning, bf16, AdamW'
    """
    return ", ".join(_WORDS[key][values[key]] for key in RESULT_CHOICES)


def describe_recipe(recipe: TrainRecipe) -> str:
    """`describe_choice`, and whether activations are recomputed.

    >>> describe_recipe(TrainRecipe(finetuning="lora", gradient_checkpointing=True))
    'LoRA, fp32, AdamW, checkpointing'
    """
    said = describe_choice({key: getattr(recipe, key) for key in RESULT_CHOICES})
    if not recipe.gradient_checkpointing:
        return said
    if recipe.checkpointed_layers is None:
        return f"{said}, checkpointing"
    blocks = (
        "1 block" if recipe.checkpointed_layers == 1 else f"{recipe.checkpointed_layers} blocks"
    )
    return f"{said}, {blocks} checkpointed"


def pinned(layers: Sequence[Layer]) -> dict[str, object]:
    """What was given of what a search could choose; the last word of each key.

    >>> pinned([Layer(origin="--seed", values={"seed": 1, "optimizer": "adamw"})])
    {'optimizer': 'adamw'}
    """
    return {k: v for layer in layers for k, v in layer.values.items() if k in CHOICES}


_PLAN_ORIGIN = "plan for "


def plan_origin(profile: HardwareProfile) -> str:
    """Where a recipe value that the plan chose comes from."""
    return f"{_PLAN_ORIGIN}{profile.name}"


def is_planned(origin: str) -> bool:
    """Whether a recipe value comes from a plan.

    >>> is_planned("plan for t4"), is_planned("--optimizer")
    (True, False)
    """
    return origin.startswith(_PLAN_ORIGIN)


def faithful_order(
    profile: HardwareProfile, *, fp32_first: bool = False
) -> list[Mapping[str, object]]:
    """Choices from full fine-tuning with fp32 weights down to adapters on a 4-bit base.

    The profile's own precision is bf16, fp16 where bf16 is emulated, or "no" on a CPU.

    >>> from accel_gpt2.catalog.profiles import PROFILES
    >>> for choice in faithful_order(PROFILES["rtx4070ti"]): print(describe_choice(choice))
    full fine-tuning, bf16, AdamW
    full fine-tuning, bf16, 8-bit AdamW
    full fine-tuning, pure bf16, 8-bit AdamW
    LoRA, bf16, AdamW
    QLoRA, bf16, AdamW
    """
    precision = profile.recipe_defaults.get("mixed_precision", "no")
    order = [("full", precision, "adamw"), ("full", precision, "adamw_8bit")]
    if fp32_first and precision != "no":
        order.insert(0, ("full", "no", "adamw"))
    if precision == "bf16":  # elsewhere it is emulated, many times slower
        order.append(("full", "pure_bf16", "adamw_8bit"))
    order += [("lora", precision, "adamw"), ("qlora", precision, "adamw")]
    return [dict(zip(RESULT_CHOICES, values, strict=True)) for values in order]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One choice of the faithful order under what was given: a recipe, or why there is none."""

    label: str
    resolved: ResolvedRecipe | None
    problem: str = ""


def levels(layers: Sequence[Layer], profile: HardwareProfile, *, fp32_first: bool) -> list[Level]:
    """The faithful order with what was given in the place of what it would choose, each once."""
    given = pinned(layers)
    found: dict[str, Level] = {}
    for choice in faithful_order(profile, fp32_first=fp32_first):
        label = describe_choice({**choice, **given})
        if label in found:
            continue
        free = {key: value for key, value in choice.items() if key not in given}
        try:
            resolved = resolve([Layer(origin=plan_origin(profile), values=free), *layers])
        except UsageError as error:
            problem = str(error).splitlines()[0].rstrip(".")
            found[label] = Level(label=label, resolved=None, problem=problem)
        else:
            found[label] = Level(label=label, resolved=resolved)
    return list(found.values())


def spreads(
    recipe: TrainRecipe,
    profile: HardwareProfile,
    *,
    num_classes: int,
    strategy: ShardingStrategy | None = None,
) -> Iterator[tuple[ShardingStrategy, Placement]]:
    """Ways over the machine: each model on all GPUs, or whole models on single ones.

    A placement that the recipe asks for, and a `strategy`, are kept whether they help or not.
    """
    placements = applicable_placements(recipe, num_classes=num_classes, num_gpus=profile.num_gpus)
    if recipe.placement != "auto":
        placements = (recipe.placement,)
    for row in STRATEGIES.values() if strategy is None else [strategy]:
        if row.backend == "none":
            for placement in placements:
                # One model after another has all GPUs: `train` starts a process on each.
                if placement != "sequential" or profile.num_gpus <= 1 or strategy is not None:
                    yield row, placement
        elif strategy is not None:
            yield row, "sequential" if "sequential" in placements else placements[0]
        elif "sequential" in placements and row.smallest_world_size <= profile.num_gpus:
            yield row, "sequential"


def cuts(
    resolved: ResolvedRecipe,
    layers: Sequence[Layer],
    profile: HardwareProfile,
    *,
    longest_tokens: int,
) -> Iterator[ResolvedRecipe]:
    """The same training with its steps cut in other ways, which changes rounding only."""
    given = pinned(layers)
    free = [key for key in RUN_CHOICES if key not in given]
    origins = {**resolved.origins, **dict.fromkeys(free, plan_origin(profile))}
    recipe = resolved.recipe
    checkpointing = [False, True] if "gradient_checkpointing" in free else []
    if "checkpointed_layers" in given:
        checkpointing = []
    micro_batches: Sequence[int] = ()
    if "micro_batch_tokens" in free:
        micro_batches = micro_batch_candidates(
            recipe, longest_tokens=longest_tokens, num_gpus=profile.num_gpus
        )
    for gradient_checkpointing in checkpointing or [recipe.gradient_checkpointing]:
        for micro_batch_tokens in micro_batches or [recipe.micro_batch_tokens]:
            cut = dataclasses.replace(
                recipe,
                gradient_checkpointing=gradient_checkpointing,
                micro_batch_tokens=micro_batch_tokens,
            )
            yield ResolvedRecipe(recipe=cut, origins=origins)


def fewest_checkpointed(
    whole: TrainRecipe, n_layer: int, fits: Callable[[TrainRecipe], bool], *, guess: int
) -> TrainRecipe | None:
    """A recipe with only as many of its blocks checkpointed as make it fit: the rest is faster.

    Args:
        whole: fits with all blocks checkpointed, and not with none; a step's memory falls from one
            such number to the next.
        fits: whether a recipe does. It is asked two or three times where the guess is good.
        guess: what it might be.

    Returns:
        None where all blocks have to be.

    >>> recipe = TrainRecipe(gradient_checkpointing=True)
    >>> fewest = fewest_checkpointed(
    ...     recipe, 12, lambda cut: cut.checkpointed_layers >= 5, guess=4
    ... )
    >>> fewest.checkpointed_layers
    5
    >>> fewest_checkpointed(recipe, 12, lambda cut: False, guess=4)
    """
    too_few, enough, stride = 0, n_layer, 1
    count = min(max(1, guess), n_layer - 1)
    while enough - too_few > 1:
        # Away from the guess in strides that double, until the answer lies in between.
        if fits(dataclasses.replace(whole, checkpointed_layers=count)):
            enough = count
            count = max((too_few + enough) // 2, enough - stride)
        else:
            too_few = count
            count = min((too_few + enough + 1) // 2, too_few + stride)
        stride *= 2
    if enough == n_layer:
        return None
    return dataclasses.replace(whole, checkpointed_layers=enough)


def micro_batch_candidates(
    recipe: TrainRecipe, *, longest_tokens: int, num_gpus: int
) -> tuple[int, ...]:
    """Tokens: one whole document, and halves of halves of a GPU's share of the global batch.

    Smaller ones would save nothing, since a micro batch holds at least one document. Halves have
    room for padding and for whole documents, without which they would be cut once more.

    >>> micro_batch_candidates(TrainRecipe(), longest_tokens=1024, num_gpus=1)
    (1024, 2560, 5120, 8192)
    >>> micro_batch_candidates(TrainRecipe(packing="off"), longest_tokens=1000, num_gpus=4)
    (512, 1280, 2560, 5120)
    >>> micro_batch_candidates(TrainRecipe(), longest_tokens=1024, num_gpus=0)
    (1024, 2048, 4096)
    """
    tokens = recipe.global_batch_tokens or (recipe.global_batch_size or 1) * longest_tokens
    share = -(-tokens // max(1, num_gpus))
    # A CPU gains nothing from more at once.
    largest = max(_ALWAYS_TRIED_TOKENS, share) if num_gpus else _ALWAYS_TRIED_TOKENS
    smallest = 2 ** (longest_tokens.bit_length() - 1)
    if num_gpus and recipe.global_batch_tokens is not None:
        largest = math.ceil(largest * _ROOM)
    halves = []
    while largest > 1.5 * smallest:
        halves.append(largest)
        largest = -(-largest // 2)
    if halves and num_gpus == 1 and packs_rows(recipe):
        halves[0] = min(halves[0], share)  # all of it
    return (smallest, *reversed(halves))
