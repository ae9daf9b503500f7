"""Where a model's weights are; without torch, so that the launcher can ask before it starts one."""

import os
from pathlib import Path

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.errors import UsageError

MODELS_VARIABLE = "ACCEL_GPT2_MODELS"


def local_model(name: str) -> Path | None:
    """The directory of a model: the path itself, or `name` in the folder of ACCEL_GPT2_MODELS.

    None where neither holds a config.json.
    """
    folder = os.environ.get(MODELS_VARIABLE)
    candidates = [Path(name), *([Path(folder).expanduser() / name] if folder else [])]
    # os.path, which takes every string for a name, as pathlib does not.
    return next((path for path in candidates if os.path.isfile(path / "config.json")), None)


def weights_location(model: str) -> str:
    """What `from_pretrained` is given: a local directory where there is one, else the hub id.

    Raises:
        UsageError: when the model has no pretrained weights anywhere.
    """
    if (directory := local_model(model)) is not None:
        return str(directory)
    row = MODELS.get(model)
    if row is None:
        return model
    if row.hub_id is None:
        raise UsageError(f"{model} has no pretrained weights; give --init scratch.")
    return row.hub_id


def weights_are_cached(location: str) -> bool:
    """Whether the weights are a local directory, or in the hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if os.path.isdir(location):
        return True
    try:
        names = ("model.safetensors", "model.safetensors.index.json")
        return any(isinstance(try_to_load_from_cache(location, name), str) for name in names)
    except HFValidationError:
        return False
