"""Per-class GPT-2 language models as generative text classifiers."""

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel_gpt2.estimator import GenerativeClassifier

__all__ = ["GenerativeClassifier", "__version__"]

try:
    __version__ = version("accel-gpt2")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

# Here, because whatever of this package is imported first may load torch.

# OpenMP threads that wait by spinning take the other threads' cores away wherever anything else
# runs (docs/benchmarks/2026-11-23-openmp-wait.md). Read by OpenMP when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Where several processes train, one that goes leaves the others' connections to warn of it in pages
# of C++ frames, before anybody can say why. Read when torch is loaded; errors are still shown.
if os.environ.get("WORLD_SIZE", "1") != "1":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def __getattr__(name: str) -> Any:
    if name == "GenerativeClassifier":  # on demand, because scikit-learn takes a second to load
        from accel_gpt2.estimator import GenerativeClassifier

        return GenerativeClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
