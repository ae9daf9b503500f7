"""What the benchmarks of a GPU are asked for; each rehearses on a CPU with `--device cpu`.

A machine that has torch, transformers, accelerate and peft, and no package index, wants the wheels
of annotated-types, pydantic, pydantic-core and typing-inspection besides, 3 MB for its Python:

    pip download --no-deps --only-binary=:all: --python-version 3.12 \\
        --platform manylinux2014_x86_64 --constraint constraints.txt --dest wheels \\
        annotated-types pydantic pydantic-core typing-inspection
    pip install --no-index --no-deps --target site wheels/*.whl          # there, and then
    PYTHONPATH=site:. python benchmarks/gpu_bench.py
"""

import argparse
import os
from pathlib import Path

from results import say


def gpu_options(description: str, *, seconds: float) -> argparse.ArgumentParser:
    """The options that these benchmarks share.

    Args:
        description: of the script; its first line is shown.
        seconds: it ends after so many, unless it is told otherwise.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", choices=("all", "tiny"), default="all")
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument(
        "--output", type=Path, default=Path(os.environ.get("OUT", "docs/benchmarks"))
    )
    return parser


def is_there(device: str) -> bool:
    """Whether torch sees the device; says so where it does not."""
    import torch

    there = device == "cpu" or torch.cuda.is_available()
    if not there:
        say(f"torch {torch.__version__} sees no GPU; give --device cpu --sizes tiny to rehearse.")
    return there
