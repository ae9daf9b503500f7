"""Models on this machine, by the name that a recipe gives them."""

import os
from pathlib import Path

MODELS_VARIABLE = "ACCEL_GPT2_MODELS"


def local_model(name: str) -> Path | None:
    """The directory of a model: the path itself, or `name` in the folder of ACCEL_GPT2_MODELS.

    None where neither holds a config.json.
    """
    folder = os.environ.get(MODELS_VARIABLE)
    candidates = [Path(name), *([Path(folder).expanduser() / name] if folder else [])]
    # os.path, which takes every string for a name, as pathlib does not.
    return next((path for path in candidates if os.path.isfile(path / "config.json")), None)
