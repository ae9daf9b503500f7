"""What goes together: recipes, strategies and placements.

One set of rules says it to the search, to whoever starts a training, and to the table in the
documents. What contradicts itself within a recipe alone is refused by `recipe.resolve`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from accel_gpt2.catalog.strategies import STRATEGIES, ShardingStrategy
from accel_gpt2.errors import UsageError
from accel_gpt2.plan.compiling import compiling_problem
from accel_gpt2.plan.placement import PLACEMENTS, Placement
from accel_gpt2.recipe import Finetuning, TrainRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why something cannot be trained so, a clause, and the nearest that can, as it is typed."""

    reason: str
    instead: str


def _has_block_state(recipe: TrainRecipe) -> bool:
    """Whether the optimizer is bitsandbytes': its states are of blocks, or paged, or both."""
    return recipe.optimizer in {"adamw_8bit", "adamw_paged", "adamw_8bit_paged"}


# (what it is about, why it cannot be, what to type); the first that applies is what is said.
_Applies = Callable[[TrainRecipe, ShardingStrategy, Placement], bool]
_RULES: Sequence[tuple[_Applies, str, str]] = (
    (
        lambda recipe, strategy, placement: (
            strategy.backend == "deepspeed" and recipe.optimizer != "adamw"
        ),
        "ZeRO steps flat pieces of all parameters together, where the states of rows, columns or "
        "blocks would be other numbers and could not be saved whole",
        "--optimizer adamw or --strategy ddp",
    ),
    (
        lambda recipe, strategy, placement: (
            strategy.backend == "fsdp2" and _has_block_state(recipe)
        ),
        "bitsandbytes' optimizers do not take FSDP2's DTensors",
        "--optimizer adamw or --strategy ddp",
    ),
    (
        lambda recipe, strategy, placement: (
            strategy.backend == "fsdp2" and recipe.optimizer == "adafactor"
        ),
        "torch's Adafactor takes norms of rows and columns in place, which FSDP2's DTensors do not "
        "allow",
        "--optimizer adamw or --strategy ddp",
    ),
    (
        lambda recipe, strategy, placement: (
            strategy.backend == "fsdp2" and recipe.objective == "hybrid"
        ),
        "FSDP2 shards no scalar, and a hybrid learns one",
        "--strategy ddp",
    ),
    (
        lambda recipe, strategy, placement: (
            strategy.backend == "deepspeed" and recipe.mixed_precision == "pure_bf16"
        ),
        "DeepSpeed keeps fp32 weights of its own beside bf16 ones",
        "--mixed-precision bf16 or --strategy ddp",
    ),
    (
        lambda recipe, strategy, placement: (
            strategy.backend == "deepspeed" and recipe.mixed_precision == "fp16"
        ),
        "DeepSpeed scales fp16 losses and skips steps by rules of its own",
        "--mixed-precision bf16 or --strategy ddp",
    ),
    (
        lambda recipe, strategy, placement: strategy.backend != "none" and recipe.release_gradients,
        "gradients that are let go of one by one are not exchanged between processes",
        "--strategy single, or leave release_gradients out",
    ),
    (
        lambda recipe, strategy, placement: (
            placement == "shared-base" and strategy.backend != "none"
        ),
        "one process trains all classes there, on the one base that it holds",
        "--placement per-gpu with --strategy single for a process and a base for each class, or "
        "--placement sequential",
    ),
    (
        lambda recipe, strategy, placement: (
            placement != "sequential" and strategy.backend != "none"
        ),
        "each model has one process there, and a strategy spreads it over several",
        "--placement sequential or --strategy single",
    ),
    (
        lambda recipe, strategy, placement: (
            placement != "sequential"
            and recipe.objective in {"classification", "hybrid", "unconditional"}
        ),
        "there is one training for all classes",
        "--placement sequential",
    ),
    (
        lambda recipe, strategy, placement: (
            placement == "shared-base" and recipe.finetuning == "full"
        ),
        "only adapters leave the base as it is",
        "--finetuning lora or --placement sequential",
    ),
)


def refusal(
    recipe: TrainRecipe, strategy: ShardingStrategy, placement: Placement = "sequential"
) -> Refusal | None:
    """Why a recipe cannot be trained under a strategy and placement; None where it can.

    >>> refusal(TrainRecipe(optimizer="adamw_8bit"), STRATEGIES["fsdp2"]).reason
    "bitsandbytes' optimizers do not take FSDP2's DTensors"
    >>> refusal(TrainRecipe(), STRATEGIES["fsdp2"])
    """
    for applies, reason, instead in _RULES:
        if applies(recipe, strategy, placement):
            return Refusal(reason=reason, instead=instead)
    if recipe.compile == "on":
        problem = compiling_problem(dataclasses.replace(recipe, placement=placement), strategy)
        if problem is not None:
            return Refusal(reason=f"compile = 'on': {problem}", instead="--set compile=off")
    return None


def check_supported(
    recipe: TrainRecipe, strategy: ShardingStrategy, placement: Placement = "sequential"
) -> None:
    """Raise UsageError, with the nearest that works, for what cannot be trained so."""
    found = refusal(recipe, strategy, placement)
    if found is not None:
        what = strategy.name if placement == "sequential" else placement
        raise UsageError(
            f"This recipe cannot be trained with {what}: {found.reason}; give {found.instead}."
        )


# What a recipe can ask for beside the default of full fine-tuning with AdamW in fp32: the rows of
# the table, and what its test trains.
VARIANTS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "fp32": {},
        "bf16": {"mixed_precision": "bf16"},
        "fp16": {"mixed_precision": "fp16"},
        "pure bf16": {"mixed_precision": "pure_bf16"},
        "checkpointing": {"gradient_checkpointing": True},
        "some blocks checkpointed": {"gradient_checkpointing": True, "checkpointed_layers": 1},
        "released gradients": {
            "release_gradients": True,
            "max_grad_norm": 0.0,
            "micro_batch_tokens": 8192,  # the global batch
        },
        "8-bit AdamW": {"optimizer": "adamw_8bit"},
        "paged AdamW": {"optimizer": "adamw_paged"},
        "paged 8-bit AdamW": {"optimizer": "adamw_8bit_paged"},
        "Adafactor": {"optimizer": "adafactor"},
        "LoRA": {"finetuning": "lora"},
        "DoRA": {"finetuning": "lora", "use_dora": True},
        "QLoRA": {"finetuning": "qlora"},
        "QLoRA on int8": {"finetuning": "qlora", "quantization": "int8"},
        "masked LM": {"objective": "masked_lm"},
        "classification head": {"objective": "classification"},
        "hybrid": {"objective": "hybrid"},
        "one model of all text": {"objective": "unconditional"},
    }
)

# What has no kernels on a CPU: no test of ours has run it anywhere but on a GPU.
GPU_ONLY = frozenset({"fp16"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """The table: `rows[variant]` has a `Refusal`, or None for what works, in each of `columns`,
    which are the strategies, then the placements but `sequential`."""

    columns: Sequence[str]
    rows: Mapping[str, Sequence[Refusal | None]]

    @property
    def notes(self) -> Sequence[Refusal]:
        """Every reason, once."""
        return list(dict.fromkeys(x for row in self.rows.values() for x in row if x is not None))


def variant_recipe(name: str, *, finetuning: Finetuning = "full") -> TrainRecipe:
    """The recipe of a variant; `finetuning` is what it has where it says nothing of it."""
    return TrainRecipe(**{"finetuning": finetuning, **VARIANTS[name]})  # type: ignore[arg-type]


def support() -> Support:
    """What can be trained how, by the rules."""
    placements = [name for name in PLACEMENTS if name != "sequential"]
    rows = {}
    for name in VARIANTS:
        recipe, adapted = variant_recipe(name), variant_recipe(name, finetuning="lora")
        rows[name] = [
            *(refusal(recipe, strategy) for strategy in STRATEGIES.values()),
            # Full fine-tuning has one rule there; what else goes with a base is of adapters.
            *(
                refusal(
                    adapted if x == "shared-base" and name != "fp32" else recipe,
                    STRATEGIES["single"],
                    x,
                )
                for x in placements
            ),
        ]
    return Support(columns=[*STRATEGIES, *placements], rows=rows)
