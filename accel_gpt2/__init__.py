"""Per-class GPT-2 language models as generative text classifiers."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("accel-gpt2")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
