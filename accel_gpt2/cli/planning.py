"""A plan for this machine: the shape of a model in a folder, what was measured here, what is kept.

`plan` shows it and `train` follows it. Everything is arithmetic and small files: no torch.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from accel_gpt2.catalog.models import MODELS, ModelSpec, ModelType
from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import STRATEGIES, ShardingStrategy
from accel_gpt2.cli.hardware import describe_profile
from accel_gpt2.cli.output import say
from accel_gpt2.cli.run_directory import RECIPE_FILE
from accel_gpt2.data.cache import cache_directory
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.plan.calibration import CALIBRATION_FILE, Calibration, read_records
from accel_gpt2.plan.candidates import RESULT_CHOICES, Preference
from accel_gpt2.plan.data import DataStatistics, dataset_statistics
from accel_gpt2.plan.memory import ByteRange, MemoryPlan, MemoryTerm, covers, plan_memory
from accel_gpt2.plan.ranking import shortage
from accel_gpt2.plan.search import Depth, RunPlan, plan_run
from accel_gpt2.recipe import Layer, TrainRecipe
from accel_gpt2.recipe.layers import read_layer
from accel_gpt2.recipe.resolving import resolve

# For what the closed form does not know (an encoder, another objective): as a language model of the
# same shape, with as much again for what that leaves out.
_UNCOVERED_MARGIN = 2

# Models trained side by side by the hybrid objective, where the data set's classes are not known.
_ASSUMED_CLASSES = 4

# For a model of unknown shape: what fits GPT-2 XL's LoRA on a 16 GB card. Training halves the
# micro batch by itself where even that is too much.
_UNKNOWN_MODEL_TOKENS = 1024


def model_spec(recipe: TrainRecipe) -> ModelSpec | None:
    """The shape of a recipe's model: of a folder, or of a catalog row; None when unknown."""
    from accel_gpt2.data.weights import local_model

    directory = local_model(recipe.model)
    spec = MODELS.get(recipe.model) if directory is None else _read_spec(directory, recipe.model)
    if spec is not None and recipe.tokenizer == "train":
        return dataclasses.replace(spec, vocab_size=recipe.tokenizer_vocab_size)
    return spec


# A size's name in a config.json: GPT-2's own, then what most architectures call it.
_CONFIG_KEYS = {
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_embd": ("n_embd", "hidden_size"),
    "n_positions": ("n_positions", "max_position_embeddings"),
    "vocab_size": ("vocab_size",),
}


def _read_spec(directory: Path, name: str) -> ModelSpec | None:
    """The row that a folder's config.json would have; None where it does not say the sizes."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        sizes = {
            size: next(config[key] for key in keys if key in config)
            for size, keys in _CONFIG_KEYS.items()
        }
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        return None
    kind = config.get("model_type")
    model_type: ModelType = (
        "gpt2" if kind == "gpt2" else "roberta" if kind == "roberta" else "other"
    )
    return ModelSpec(name=name, model_type=model_type, hub_id=None, source=str(path), **sizes)


def statistics(recipe: TrainRecipe) -> DataStatistics | None:
    """Of local files or of a catalog row; None where they are to be had from the hub alone.

    What is wrong with files is for the training to say.
    """
    if not (os.environ.get("ACCEL_GPT2_DATA") or os.path.exists(recipe.dataset)):
        known = dataset_statistics(recipe)  # without loading what reads files
        if known is not None:
            return known
    from accel_gpt2.data.estimate import estimate_statistics

    try:
        return estimate_statistics(
            recipe, on_reading=lambda path: say(f"Reading {path} once, for its texts' lengths")
        )
    except UserError:
        return None


def kept_choices(
    run_directory: Path, profile: HardwareProfile, *, resume: str
) -> tuple[Layer, ...]:
    """What a begun run was planned with and has to go on with, whatever a plan would say today.

    Raises:
        UsageError: when the run's recipe cannot be read.
    """
    path = run_directory / RECIPE_FILE
    begun = os.path.isfile(path) and any(run_directory.glob("class-*"))
    if resume == "never" or not begun:
        return ()
    recipe = resolve([read_layer(path)]).recipe
    values = {key: getattr(recipe, key) for key in RESULT_CHOICES}
    if profile.gpu is None:  # the precision of a GPU is none for a CPU; the training says so
        values["mixed_precision"] = "no"
    return (Layer(origin=str(path), values=values),)


def asked_strategy(
    name: str, profile: HardwareProfile, *, profile_name: str
) -> ShardingStrategy | None:
    """The strategy that `--strategy` asks for; None where it leaves it to the plan.

    Args:
        profile: the one that is used.
        profile_name: the one that was asked for, which may have GPUs that are not here.

    Raises:
        UsageError: when the profile has not as many GPUs as it takes.
    """
    if name == "auto":
        return None
    strategy = STRATEGIES[name]
    num_processes = max(1, profile.num_gpus)
    if num_processes < strategy.smallest_world_size:
        there = f"profile {profile.name} has {profile.num_gpus}"
        if profile_name not in {"auto", profile.name}:
            there = f"of the GPUs of profile {profile_name} none can be used here"
        raise UsageError(
            f"--strategy {name} spreads a model over {strategy.smallest_world_size} GPUs or more, "
            f"and {there}: give --strategy single."
        )
    return strategy


def plan_here(
    layers: Sequence[Layer],
    profile: HardwareProfile,
    *,
    prefer: Preference = "faithful",
    depth: Depth = "all",
    strategy: ShardingStrategy | None = None,
) -> RunPlan | None:
    """The plan of what was given; None for a model whose shape is not known.

    What the closed form does not cover is planned as a language model of the same shape with a
    margin, and searched for what changes rounding only: a guess may not change what is trained.

    Raises:
        UsageError: when what was given is no recipe, or cannot be trained as it is asked for.
    """
    recipe = resolve(layers).recipe
    model = model_spec(recipe)
    if model is None:
        return None
    data = statistics(recipe)
    if covers(recipe, model):
        return plan_run(
            layers,
            profile,
            model=model,
            data=data,
            prefer=prefer,
            strategy=strategy,
            depth=depth,
            calibration=measured_here(),
        )
    return plan_run(
        layers,
        profile,
        model=model,
        data=data,
        prefer=prefer,
        strategy=strategy,
        only_rounding=True,
        memory_of=cautious_memory,
    )


def measured_here() -> Calibration:
    """What trainings and benches on this machine measured before."""
    return read_records(cache_directory() / CALIBRATION_FILE)


def cautious_memory(
    recipe: TrainRecipe,
    model: ModelSpec,
    profile: HardwareProfile,
    strategy: ShardingStrategy,
    *,
    longest_tokens: int,
) -> MemoryPlan:
    """`plan_memory` of a language model of the same shape, with a margin for what it is not."""
    factor = _UNCOVERED_MARGIN
    if recipe.objective == "hybrid":
        factor *= len(recipe.class_names) or _ASSUMED_CLASSES
    as_generative = dataclasses.replace(recipe, objective="generative")
    as_gpt2 = dataclasses.replace(model, model_type="gpt2")
    plan = plan_memory(as_generative, as_gpt2, profile, strategy, longest_tokens=longest_tokens)
    margin = MemoryTerm(
        name="margin",
        bytes=(factor - 1) * plan.allocated_bytes,
        why=f"{factor} x a GPT-2 language model of this shape, because the formulas are of those.",
    )
    return dataclasses.replace(
        plan,
        phases=tuple(
            dataclasses.replace(phase, terms=(*phase.terms, margin)) for phase in plan.phases
        ),
        reserved=_raised(plan.reserved, margin.bytes),
        device=_raised(plan.device, margin.bytes),
    )


def traced(plan: RunPlan) -> RunPlan:
    """A plan whose recommended recipe has its memory from a trace of its own step.

    For what no formula covers. The first time takes about half a minute, in a process of its own.

    Raises:
        UserError: when the step cannot be traced.
    """
    from accel_gpt2.trace.plan import plan_traced

    option = plan.recommended
    if option is None:
        return plan
    recipe, data = option.recipe, plan.data
    longest = recipe.max_length if data is None else min(recipe.max_length, data.longest_tokens)
    memory = plan_traced(
        recipe,
        plan.profile,
        option.strategy,
        longest_tokens=longest,
        num_classes=_ASSUMED_CLASSES if data is None else data.num_classes,
        vocab_size=plan.model.vocab_size if recipe.tokenizer == "train" else None,
    )
    known = dataclasses.replace(option, memory=memory, device=memory.device, verdict=memory.verdict)
    return dataclasses.replace(plan, recommended=known)


def _raised(range_: ByteRange, num_bytes: int) -> ByteRange:
    return ByteRange(
        low=range_.low, expected=range_.expected + num_bytes, high=range_.high + num_bytes
    )


def unknown_model_layer(profile: HardwareProfile) -> Layer:
    """Careful values for a model of unknown shape."""
    return Layer(
        origin=f"profile {profile.name}",
        values={
            **profile.recipe_defaults,
            "micro_batch_tokens": _UNKNOWN_MODEL_TOKENS,
            "gradient_checkpointing": profile.gpu is not None,
        },
    )


def does_not_fit(plan: RunPlan) -> str:
    """What nothing that was asked for fits into, and the nearest change with which something does.

    Of a plan that recommends nothing.
    """
    sentence = (
        f"{plan.model.name} does not fit on {describe_profile(plan.profile)} as asked: with "
        f"{plan.smallest.label} it {shortage(plan.smallest, plan.profile)}."
    )
    if plan.nearest is None:
        return f"{sentence} Give a smaller --model or a machine with more memory."
    return f"{sentence} Give {plan.nearest.change}."
