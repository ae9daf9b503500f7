"""Every cell of docs/support.md that says yes is trained, as one process would train it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.classify.status import read_classes
from accel_gpt2.plan.placement import Placement
from accel_gpt2.plan.support import GPU_ONLY, VARIANTS, refusal, variant_recipe
from accel_gpt2.recipe import Finetuning, Layer, ResolvedRecipe
from accel_gpt2.recipe.resolving import resolve
from tests.conftest import write_texts

from .harness import run
from .placed import train_each_placed
from .trainings import train, train_each

# Scores of validation documents, relative: rounding in fp32; and where 16 or fewer bits are kept,
# what another order of sums makes of them.
_ROUNDING = 2e-5
_COARSE = 5e-3
_COARSE_VARIANTS = {
    "bf16",
    "pure bf16",
    "8-bit AdamW",
    "paged 8-bit AdamW",
    "QLoRA",
    "QLoRA on int8",
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ResolvedRecipe]:
    """Each variant on two classes and a model of two small blocks, for two steps."""
    from transformers import GPT2Config

    folder = tmp_path_factory.mktemp("support")
    texts = write_texts(folder / "texts.csv", documents_per_class=20, num_classes=2)
    GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64).save_pretrained(folder / "shape")
    values: dict[str, Any] = {
        "dataset": str(texts),
        "model": str(folder / "shape"),
        "init": "scratch",
        "tokenizer": "train",
        "tokenizer_vocab_size": 300,
        "max_length": 48,
        "max_steps": 2,
        "global_batch_size": 8,
        "micro_batch_tokens": 128,  # two or more of them
        "dropout": 0.0,
        # AdamW makes a whole step of a gradient that is rounding; fp32 is to be told from that.
        "adam_epsilon": 1e-5,
        "warmup_fraction": 0.0,
        "trackers": [],
        "placement": "sequential",
    }
    base = resolve([Layer(origin="test", values=values)])
    run("single", 1, train, base, folder / "base")
    adapted = {
        "model": str(next((folder / "base").glob("class-0-*/final"))),
        "init": "pretrained",
        "tokenizer": "auto",
        "learning_rate": 3e-3,
    }
    found = {}
    for name, changes in VARIANTS.items():
        more: dict[str, Any] = {}
        if "finetuning" in changes:
            more = adapted
        elif changes.get("objective") == "masked_lm":
            more = {"model": "roberta-tiny"}
        if "micro_batch_tokens" in changes:
            more = {"global_batch_size": None, "global_batch_tokens": 128}
            changes = {**changes, "micro_batch_tokens": 128}
        layers = [Layer(origin="test", values={**values, **more, **changes})]
        found[name] = resolve(layers)
    return found


@pytest.fixture(scope="module")
def alone(
    recipes: Mapping[str, ResolvedRecipe], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """The runs of one process."""
    return _trained("single", 1, recipes, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def adapted(
    recipes: Mapping[str, ResolvedRecipe], alone: Mapping[str, Path]
) -> Mapping[str, ResolvedRecipe]:
    """Each variant that goes with a shared base, as LoRA where it says nothing of adapters."""
    return {
        name: recipes[name]
        if "finetuning" in VARIANTS[name]
        else _changed(
            recipes[name],
            finetuning="lora",
            learning_rate=3e-3,
            init="pretrained",
            tokenizer="auto",
            model=str(next(alone[name if name == "masked LM" else "fp32"].glob("class-0-*/final"))),
        )
        for name in _supported("single", "shared-base", finetuning="lora")
        if name != "fp32"  # full fine-tuning, which has no base to share
    }


def _changed(resolved: ResolvedRecipe, **changes: Any) -> ResolvedRecipe:
    return dataclasses.replace(resolved, recipe=dataclasses.replace(resolved.recipe, **changes))


def _supported(
    strategy: str, placement: Placement = "sequential", *, finetuning: Finetuning = "full"
) -> list[str]:
    """The variants that can be trained so, on a CPU."""
    return [
        name
        for name in VARIANTS
        if name not in GPU_ONLY
        and refusal(variant_recipe(name, finetuning=finetuning), STRATEGIES[strategy], placement)
        is None
    ]


def _trained(
    strategy: str, num_processes: int, recipes: Mapping[str, ResolvedRecipe], folder: Path
) -> dict[str, Path]:
    wanted = {name: recipes[name] for name in _supported(strategy)}
    return _train(strategy, num_processes, train_each, wanted, folder)


def _train(
    strategy: str,
    num_processes: int,
    train: Callable[[Sequence[tuple[ResolvedRecipe, Path]]], None],
    recipes: Mapping[str, ResolvedRecipe],
    folder: Path,
) -> dict[str, Path]:
    runs = {name: folder / name.replace(" ", "-") for name in recipes}
    trainings = [(recipes[name], runs[name]) for name in recipes]
    run(strategy, num_processes, train, trainings, timeout_seconds=300.0)
    return runs


@pytest.mark.parametrize(
    ("strategy", "num_processes"),
    [
        *((name, 2) for name, row in STRATEGIES.items() if row.backend != "none"),
        *((name, 1) for name, row in STRATEGIES.items() if row.offloads_optimizer),
    ],
)
def test_all_that_is_supported_is_trained(
    strategy: str,
    num_processes: int,
    recipes: Mapping[str, ResolvedRecipe],
    alone: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    """Scores and exported models are those of one process, for every variant of the table."""
    runs = _trained(strategy, num_processes, recipes, tmp_path)
    assert len(runs) >= 10
    for name, directory in runs.items():
        _assert_alike(directory, alone[name], _COARSE if name in _COARSE_VARIANTS else _ROUNDING)


@pytest.mark.parametrize("placement", ["per-gpu", "concurrent"])
def test_all_that_is_supported_is_trained_in_processes_of_its_own(
    placement: Placement,
    recipes: Mapping[str, ResolvedRecipe],
    alone: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    """Bit for bit what one class after another comes to, for every variant of the table."""
    placed = {
        name: _changed(recipes[name], placement=placement)
        for name in _supported("single", placement)
    }
    runs = _train("single", 1, train_each_placed, placed, tmp_path)
    assert len(runs) >= 15
    for name, directory in runs.items():
        _assert_alike(directory, alone[name], 0)
        processes = {status.process for status in read_classes(directory)}
        assert len(processes) == 2, name


def test_all_that_is_supported_is_trained_on_one_base(
    adapted: Mapping[str, ResolvedRecipe], tmp_path: Path
) -> None:
    """Adapters side by side are those of one class after another, for every variant of the table,
    in the same process."""
    shared = {name: _changed(recipe, placement="shared-base") for name, recipe in adapted.items()}
    alone = _train("single", 1, train_each, adapted, tmp_path / "alone")
    runs = _train("single", 1, train_each, shared, tmp_path / "shared")
    assert len(runs) >= 14
    for name, directory in runs.items():
        assert '"event": "shared_base"' in (directory / "log.jsonl").read_text(), name
        _assert_alike(directory, alone[name], _COARSE if name in _COARSE_VARIANTS else _ROUNDING)


def _assert_alike(directory: Path, reference: Path, tolerance: float) -> None:
    scores = sorted(reference.glob("class-*/validation_scores/2.npy"))
    finals = sorted(reference.glob("class-*/final/*.safetensors"))
    assert scores
    assert finals
    for path in scores:
        own = np.load(directory / path.relative_to(reference))
        np.testing.assert_allclose(own, np.load(path), rtol=tolerance, err_msg=str(directory))
    for path in finals:
        own, theirs = load_file(directory / path.relative_to(reference)), load_file(path)
        assert own.keys() == theirs.keys(), directory
        for name, tensor in theirs.items():
            assert own[name].shape == tensor.shape, (directory, name)
            assert own[name].isfinite().all(), (directory, name)


def test_one_process_trains_every_variant(
    recipes: Mapping[str, ResolvedRecipe], alone: Mapping[str, Path]
) -> None:
    """All but what has no kernels on a CPU, each into a model of its own, unlike the plain one."""
    assert set(alone) == set(VARIANTS) - GPU_ONLY
    assert all(
        dataclasses.asdict(recipes[name].recipe) != dataclasses.asdict(recipes["fp32"].recipe)
        for name in VARIANTS
        if name != "fp32"
    )
    for directory in alone.values():
        assert list(directory.glob("class-*/final/*.safetensors")), directory
