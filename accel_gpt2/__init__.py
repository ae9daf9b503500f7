"""Per-class GPT-2 language models as generative text classifiers."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel_gpt2.estimator import GenerativeClassifier

    __version__: str

__all__ = ["GenerativeClassifier", "__version__"]

# Here, because whatever of this package is imported first may load torch.

# OpenMP threads that wait by spinning take the other threads' cores away wherever anything else
# runs (docs/benchmarks/2026-11-23-openmp-wait.md). Read by OpenMP when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Where several processes train, one that goes leaves the others' connections to warn of it in pages
# of C++ frames, before anybody can say why. Read when torch is loaded; errors are still shown.
if os.environ.get("WORLD_SIZE", "1") != "1":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def __getattr__(name: str) -> Any:
    """What takes time to find out, on demand: scikit-learn a second, metadata a tenth of one."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("accel-gpt2")
        except PackageNotFoundError:  # a checkout that was never installed
            return "0+unknown"
    if name == "GenerativeClassifier":
        from accel_gpt2.estimator import GenerativeClassifier

        return GenerativeClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
