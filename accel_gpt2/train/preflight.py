"""Can this recipe start at all? Asked before anything is loaded, so that nobody waits for a no."""

from pathlib import Path

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.data.sources import check_data_available
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.model import weights_location

# How long the hub may take to answer.
_HUB_SECONDS = 5.0


def check_available(recipe: TrainRecipe) -> None:
    """Make sure that the recipe's weights and data can be had.

    Raises:
        UserError: naming all that is missing, and every way on.
    """
    problems = []
    for check in (_check_weights, check_data_available):
        try:
            check(recipe)
        except UserError as error:
            problems.append(error)
    if problems:
        text = "\n".join(str(problem) for problem in problems)
        raise type(problems[0])(text) from problems[0]


def _check_weights(recipe: TrainRecipe) -> None:
    if recipe.init == "scratch" and recipe.model in MODELS:
        return
    location = weights_location(recipe.model)
    if Path(location).is_dir():
        _check_directory(Path(location), recipe)
        return
    if recipe.model not in MODELS and recipe.model.startswith((".", "/", "~")):
        raise UserError(f"The model directory {recipe.model} does not exist.")
    if not _hub_has(location, weights=recipe.init == "pretrained"):
        raise UserError(
            f"The weights of {recipe.model} are not on this machine and the Hugging Face hub does "
            f"not give them ({location}). Train from random weights with `--init scratch` or "
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


def _hub_has(repository: str, *, weights: bool) -> bool:
    """Whether the cache or the hub has a model, found out in a few seconds."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    names = ("model.safetensors", "model.safetensors.index.json") if weights else ("config.json",)
    try:
        if any(isinstance(try_to_load_from_cache(repository, name), str) for name in names):
            return True
        if constants.HF_HUB_OFFLINE:
            return False
        files = {
            sibling.rfilename
            for sibling in HfApi().model_info(repository, timeout=_HUB_SECONDS).siblings or []
        }
    except HFValidationError:
        return False
    except Exception:
        # No network, no such repository, no permission: whatever it is, the weights cannot be had,
        # and the caller's sentence names every way on.
        return False
    return any(name in files for name in names)
