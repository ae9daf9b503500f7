"""Do all strategies train the same model?

    python benchmarks/equivalence.py [--strategies fsdp2 zero3 ...] [--steps 20]

trains a GPT-2 of two blocks on docstrings: alone in one process, and under each strategy in two
processes (gloo, on a CPU), by the loop that `train` runs, at the same global batch in fp32. Prints
Markdown: the largest relative difference of a step's loss or gradient norm and, after all steps, of
an exported tensor (largest element over largest element), for each variant of the recipe. Exit code
1 where one is above 1e-5. It takes a few minutes.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from results import say
from safetensors.torch import load_file

from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.recipe import Layer, ResolvedRecipe
from accel_gpt2.recipe.resolving import resolve

# What is installed may have a package `tests` that is not ours.
_tests = ModuleType("tests")
_tests.__path__ = [str(Path(__file__).parents[1] / "tests")]
sys.modules["tests"] = _tests

from tests.distributed.harness import run  # noqa: E402
from tests.distributed.trainings import train_each  # noqa: E402

LARGEST_DIFFERENCE = 1e-5

SETTINGS: Mapping[str, Any] = {
    "dataset": "docstrings",
    "objective": "unconditional",
    "tokenizer": "train",
    "tokenizer_vocab_size": 1024,
    "init": "scratch",
    "max_length": 64,
    "global_batch_size": 16,
    "micro_batch_tokens": 256,
    "epochs": 10.0,
    "dropout": 0.0,
    "lora_dropout": 0.0,
    # AdamW makes a whole step of a gradient that is nothing but rounding, where epsilon is as small
    # as that; GPT-2's key biases have such gradients.
    "adam_epsilon": 1e-5,
    "log_every_steps": 1,
    "validation_documents": 50,
    "trackers": (),
}

# All accumulate over several micro batches.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "clipped to 0.01": {"max_grad_norm": 0.01},
    "checkpointed": {"gradient_checkpointing": True},
    "LoRA": {"finetuning": "lora", "learning_rate": 1e-3},
    "LoRA, checkpointed": {
        "finetuning": "lora",
        "learning_rate": 1e-3,
        "gradient_checkpointing": True,
    },
    "classification head": {"objective": "classification"},
}


def main() -> int:
    """Train everything, print the table, and say whether the bar is held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    spread = [name for name, row in STRATEGIES.items() if row.backend != "none"]
    parser.add_argument("--strategies", nargs="+", choices=spread, default=spread)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("ACCEL_GPT2_CACHE", f"{temporary}/cache")
        return _table(options.strategies, options.steps, Path(temporary))


def _table(strategies: list[str], steps: int, folder: Path) -> int:
    base = _train("single", 1, {"base": _recipe(steps, {})}, folder)["base"]
    adapted = {"model": str(next(base.glob("*/final"))), "init": "pretrained", "tokenizer": "auto"}
    recipes = {
        name: _recipe(steps, {**(adapted if "finetuning" in changes else {}), **changes})
        for name, changes in VARIANTS.items()
    }
    alone = _train("single", 1, recipes, folder)
    say(f"| strategy | {' | '.join(VARIANTS)} |")
    say(f"|---|{'---|' * len(VARIANTS)}")
    largest = 0.0
    for strategy in strategies:
        together = _train(strategy, 2, recipes, folder)
        cells = []
        for name in VARIANTS:
            of_steps = max(_differences(_steps(together[name], steps), _steps(alone[name], steps)))
            of_tensors = max(_tensor_differences(together[name], alone[name]))
            largest = max(largest, of_steps, of_tensors)
            cells.append(f"{of_steps:.0e}, {of_tensors:.0e}")
        say(f"| {strategy} | {' | '.join(cells)} |")
    return 1 if largest > LARGEST_DIFFERENCE else 0


def _recipe(steps: int, changes: Mapping[str, Any]) -> ResolvedRecipe:
    values = {"model": "gpt2-tiny", **SETTINGS, "max_steps": steps, **changes}
    return resolve([Layer(origin="benchmark", values=values)])


def _train(
    strategy: str, num_processes: int, recipes: Mapping[str, ResolvedRecipe], folder: Path
) -> dict[str, Path]:
    directories = {name: folder / strategy / name for name in recipes}
    trainings = [(recipes[name], directories[name]) for name in recipes]
    run(strategy, num_processes, train_each, trainings, timeout_seconds=900.0)
    return directories


def _steps(directory: Path, count: int) -> list[float]:
    """Loss and gradient norm of each step."""
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text("utf-8").splitlines()]
    found = [row[key] for row in rows if row["event"] == "step" for key in ("loss", "grad_norm")]
    assert len(found) == 2 * count, f"{len(found)} numbers of {count} steps in {directory}"
    return found


def _differences(found: list[float], expected: list[float]) -> Iterator[float]:
    for mine, theirs in zip(found, expected, strict=True):
        yield abs(mine - theirs) / abs(theirs)


def _tensor_differences(found: Path, expected: Path) -> Iterator[float]:
    (path,) = expected.glob("*/final/*.safetensors")
    own, theirs = load_file(found / path.relative_to(expected)), load_file(path)
    assert own.keys() == theirs.keys(), f"{found} exports other tensors"
    for name, tensor in theirs.items():
        yield float((own[name] - tensor).abs().max() / tensor.abs().max())


if __name__ == "__main__":
    sys.exit(main())
