"""Can this recipe start at all? Asked before anything is loaded, so that nobody waits for a no."""

import importlib.util
import os
from pathlib import Path

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.data.hub import HubAnswer, ask_hub, is_hub_id, why_unreachable
from accel_gpt2.data.sources import check_data_available
from accel_gpt2.data.tokenizer import check_tokenizer_available
from accel_gpt2.data.weights import weights_are_cached, weights_location
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe


def check_available(recipe: TrainRecipe) -> None:
    """Make sure that the recipe's weights, tokenizer, data and libraries can be had.

    Raises:
        UserError: naming all that is missing, and every way on.
    """
    problems = []
    checks = (_check_weights, _check_tokenizer, check_data_available, check_bitsandbytes)
    for check in checks:
        try:
            check(recipe)
        except UserError as error:
            problems.append(error)
    if problems:
        text = "\n".join(str(problem) for problem in problems)
        raise type(problems[0])(text) from problems[0]


def check_bitsandbytes(recipe: TrainRecipe) -> None:
    """Raise a UserError where the recipe wants a base in 4 bits and nothing here makes one."""
    if recipe.finetuning == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "finetuning = 'qlora' needs bitsandbytes, which is not installed; type `pip install "
            "bitsandbytes`, or, where there is none (macOS), train with --finetuning lora."
        )


def _check_tokenizer(recipe: TrainRecipe) -> None:
    beside_weights = recipe.tokenizer == "auto" and recipe.init == "pretrained"
    # Where the weights are missing that has been said, and the tokenizer comes with them.
    if not beside_weights or weights_are_cached(weights_location(recipe.model)):
        check_tokenizer_available(recipe)


def _check_weights(recipe: TrainRecipe) -> None:
    if recipe.init == "scratch" and recipe.model in MODELS:
        return
    location = weights_location(recipe.model)
    if os.path.isdir(location):
        _check_directory(Path(location), recipe)
        return
    looks_like_path = recipe.model.startswith((".", "/", "~"))
    if recipe.model not in MODELS and (looks_like_path or not is_hub_id(recipe.model)):
        raise UserError(f"The model directory {recipe.model} does not exist.")
    if weights_are_cached(location):
        return
    answer = ask_hub(location, "model")
    if answer != HubAnswer.FOUND:
        said = (
            f"does not have {location} (or it is private, and HF_TOKEN does not open it)"
            if answer == HubAnswer.MISSING
            else f"{why_unreachable()} ({location})"
        )
        raise UserError(
            f"The weights of {recipe.model} are not on this machine and the Hugging Face hub "
            f"{said}. Train from random weights with `--init scratch` or "
            "`--model gpt2-tiny --dataset docstrings`; or fetch them where there is a network with "
            f"`hf download {location}` and bring that folder along (HF_HOME), or give a local "
            "folder as --model; ACCEL_GPT2_MODELS names a folder of such folders."
        )


def _check_directory(directory: Path, recipe: TrainRecipe) -> None:
    if recipe.init == "pretrained" and not any(directory.glob("*.safetensors")):
        raise UserError(
            f"{directory} holds no *.safetensors file; only safetensors weights are read. Convert "
            "them with transformers' `save_pretrained`, or give --init scratch."
        )
