"""What no recipe may ask for at once, in sentences that say what to type instead."""

from accel_gpt2.catalog.models import MODELS, ModelSpec
from accel_gpt2.recipe import TrainRecipe

_LONGEST_NAME = 4096  # of a path, on most systems


def contradictions(recipe: TrainRecipe) -> list[str]:
    """What a recipe asks for that does not go together, each a sentence with what to type."""
    problems = []
    for key in ("model", "tokenizer", "dataset", "train_split", "test_split", "profile"):
        name = getattr(recipe, key)
        if not name.strip():
            problems.append(f"{key} = {name!r}: a name is needed here.")
        if len(name) > _LONGEST_NAME:
            problems.append(
                f"{key} = '{name[:40]}...': no name and no path has {len(name):,} characters."
            )
    if recipe.global_batch_tokens is None and recipe.global_batch_size is None:
        problems.append("global_batch_tokens and global_batch_size are both empty; give one.")
    row = MODELS.get(recipe.model)
    if row is not None and recipe.max_length > row.n_positions:
        problems.append(
            f"max_length = {recipe.max_length}: {row.name} has {row.n_positions} positions; "
            f"give --max-length {row.n_positions} or less."
        )
    if row is not None and row.hub_id is None and recipe.init == "pretrained":
        problems.append(
            f"init = 'pretrained': {row.name} has no pretrained weights; give --init scratch."
        )
    if recipe.tokenizer == "train" and recipe.init == "pretrained":
        problems.append(
            "tokenizer = 'train' with init = 'pretrained': pretrained weights know only their own "
            "tokens; give --init scratch, or --set tokenizer=auto."
        )
    if recipe.finetuning != "full" and recipe.init == "scratch":
        problems.append(
            f"finetuning = {recipe.finetuning!r} with init = 'scratch': an adapter on random "
            "weights learns next to nothing; give --finetuning full, or a pretrained model."
        )
    if row is not None:
        problems += _unfit_objective(recipe, row)
    if recipe.objective == "hybrid" and recipe.finetuning != "full":
        problems.append(
            f"objective = 'hybrid' with finetuning = {recipe.finetuning!r}: the classes' models "
            "are trained whole, side by side; give --finetuning full, or objective=generative."
        )
    problems += _without_effect(recipe, row) + _unreleasable(recipe)
    if recipe.bf16_rounding == "kahan" and recipe.mixed_precision != "pure_bf16":
        problems.append(
            f"bf16_rounding = 'kahan' with mixed_precision = {recipe.mixed_precision!r}: only bf16 "
            "weights are rounded; give --mixed-precision pure_bf16, or leave the rounding out."
        )
    if recipe.budget_usd is not None and not recipe.price_usd_per_hour:
        price = "no price_usd_per_hour" if recipe.price_usd_per_hour is None else "a price of 0"
        problems.append(
            f"budget_usd = {recipe.budget_usd:g} with {price}: a budget is reached at a price; "
            "give --set price_usd_per_hour=... (what the whole machine costs), or leave the budget "
            "out and give --max-time."
        )
    return problems


def _without_effect(recipe: TrainRecipe, row: ModelSpec | None) -> list[str]:
    """Choices that nothing would read."""
    problems = []
    if recipe.use_dora and recipe.finetuning == "full":
        problems.append(
            "use_dora = True with finetuning = 'full': DoRA is a kind of adapter; give "
            "--finetuning lora or qlora, or leave use_dora out."
        )
    on_conv1d = row is not None and row.model_type == "gpt2" and recipe.finetuning == "lora"
    if recipe.use_dora and recipe.lora_dropout > 0 and on_conv1d:
        problems.append(dora_dropout_problem(recipe))
    if recipe.quantization != "nf4" and recipe.finetuning != "qlora":
        problems.append(
            f"quantization = {recipe.quantization!r} with finetuning = {recipe.finetuning!r}: only "
            "a frozen base is quantised; give --finetuning qlora, or leave the quantization out."
        )
    if recipe.packing == "on" and recipe.objective not in {"generative", "unconditional"}:
        problems.append(
            f"packing = 'on' with objective = {recipe.objective!r}: only one language model at a "
            "time reads packed rows; give --set packing=off, or leave it out."
        )
    if recipe.checkpointed_layers is None:
        return problems
    if not recipe.gradient_checkpointing:
        problems.append(
            f"checkpointed_layers = {recipe.checkpointed_layers} without gradient_checkpointing: "
            "give --gradient-checkpointing, or leave the number out."
        )
    if row is not None and recipe.checkpointed_layers > row.n_layer:
        problems.append(
            f"checkpointed_layers = {recipe.checkpointed_layers}: {row.name} has {row.n_layer} "
            f"blocks; give --set checkpointed_layers={row.n_layer} or less, or leave it out for "
            "all."
        )
    return problems


def dora_dropout_problem(recipe: TrainRecipe) -> str:
    """What DoRA under dropout would cost on GPT-2's transposed layers, and what to type.

    peft 0.21, utils/other.py: `transpose` makes the frozen weights a new parameter, which takes a
    gradient.
    """
    return (
        f"use_dora = True with lora_dropout = {recipe.lora_dropout:g} on a GPT-2: peft would make "
        "gradients of all frozen weights too; give --set lora_dropout=0, or leave use_dora out."
    )


def _unreleasable(recipe: TrainRecipe) -> list[str]:
    """What needs all gradients of a step at the same time."""
    if not recipe.release_gradients:
        return []
    problems = []
    if recipe.max_grad_norm > 0:
        problems.append(
            f"release_gradients with max_grad_norm = {recipe.max_grad_norm:g}: a global norm "
            "needs all gradients at once; give --set max_grad_norm=0, or leave release_gradients "
            "out."
        )
    if recipe.mixed_precision == "fp16":
        problems.append(
            "release_gradients with mixed_precision = 'fp16': whether the loss scale overflowed "
            "is known when all gradients are there; give --mixed-precision bf16 or no."
        )
    tokens = recipe.global_batch_tokens
    if recipe.global_batch_size is not None:  # documents of the full length, if they must be cut
        tokens = recipe.global_batch_size * (recipe.max_length - 1)
        tokens = 0 if recipe.global_batch_size == 1 else tokens
    if (tokens or 0) > recipe.micro_batch_tokens:
        problems.append(
            f"release_gradients with micro batches of {recipe.micro_batch_tokens:,} tokens of a "
            f"global batch of {tokens:,}: gradients are kept from one micro batch to the next, so "
            "nothing is released; give --set micro_batch_tokens="
            f"{tokens}, or a smaller global batch."
        )
    return problems


def _unfit_objective(recipe: TrainRecipe, row: ModelSpec) -> list[str]:
    encoder = row.model_type == "roberta"
    if encoder and recipe.objective in {"generative", "hybrid", "unconditional"}:
        return [
            f"objective = {recipe.objective!r}: {row.name} sees a token's right side too, so it "
            "gives no likelihood from left to right; give --set objective=masked_lm or "
            "objective=classification, or a GPT-2 model."
        ]
    if not encoder and recipe.objective == "masked_lm":
        return [
            f"objective = 'masked_lm': {row.name} has no mask token and sees the left side only; "
            "give --model roberta-base (or roberta-tiny, from scratch), or objective=generative."
        ]
    return []
