"""Reference runs that nothing interrupts, and the server that starts all others."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from accel_gpt2.recipe import Layer
from accel_gpt2.recipe.layers import to_yaml
from accel_gpt2.recipe.resolving import resolve
from tests.conftest import write_texts

from .harness import ForkServer, Reference, read_log

collect_ignore = ["forkserver.py"]  # a program, not for importing

# Two classes of 14 and 16 steps; an epoch's end is no checkpoint's step; every step has several
# micro batches; dropout draws random numbers that a resumed run must draw again.
_TINY = {
    "model": "gpt2-tiny",
    "tokenizer_vocab_size": 300,
    "max_length": 48,
    "global_batch_size": 4,
    "micro_batch_tokens": 64,
    "epochs": 2.0,
    "warmup_fraction": 0.1,
    "dropout": 0.1,
    "checkpoint_every_steps": 2,
    "log_every_steps": 1,
    "trackers": [],
}


@pytest.fixture(scope="session")
def breaking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything of these tests is: texts, recipes, cache, references, outputs."""
    return tmp_path_factory.mktemp("breaking")


@pytest.fixture(scope="session")
def server(breaking_folder: Path) -> Iterator[ForkServer]:
    """What starts training processes."""
    if sys.platform != "linux":
        pytest.skip("the processes are watched through Linux's /proc and prctl")
    outputs = breaking_folder / "outputs"
    outputs.mkdir()
    environment = {
        "ACCEL_GPT2_CACHE": str(breaking_folder / "cache"),
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # no threads where we fork
    }
    server = ForkServer(outputs, environment)
    yield server
    server.close()


@pytest.fixture(scope="session")
def breaking_texts(breaking_folder: Path) -> Path:
    """74 documents of two classes."""
    return write_texts(breaking_folder / "texts.csv", documents_per_class=37, num_classes=2)


@pytest.fixture(scope="session")
def write_recipe(breaking_folder: Path, breaking_texts: Path) -> Callable[..., Path]:
    """Writes the tiny recipe with some changes."""

    def write(name: str, **changes: Any) -> Path:
        values = {**_TINY, "dataset": str(breaking_texts), **changes}
        path = breaking_folder / f"{name}.yaml"
        path.write_text(to_yaml(resolve([Layer(origin="test", values=values)]).recipe))
        return path

    return write


@pytest.fixture(scope="session")
def references(
    server: ForkServer, breaking_folder: Path, write_recipe: Callable[..., Path]
) -> dict[str, Reference]:
    """Uninterrupted runs by name: full and LoRA on one process, full on two."""
    found: dict[str, Reference] = {}

    def train(name: str, *, world_size: int = 1, **changes: Any) -> None:
        recipe = write_recipe(name, **changes)
        run = breaking_folder / f"reference-{name}"
        start = server.start(run, recipe, world_size=world_size)
        assert start.wait() == [0] * world_size, start.output()
        found[name] = Reference(
            name=name,
            recipe=recipe,
            run=run,
            world_size=world_size,
            seconds=max(rank.ended_at for rank in start.ranks) - start.started_at,
            phases=tuple(rank.phases for rank in start.ranks),
            num_steps=sum(row["event"] == "step" for row in read_log(run)),
        )

    # With a single checkpoint kept, one that is removed too soon is missed at once.
    train("full", keep_checkpoints=1)
    base = str(next((breaking_folder / "reference-full").glob("class-0-*/final")))
    train(
        "lora",
        model=base,
        init="pretrained",
        tokenizer="auto",
        finetuning="lora",
        lora_dropout=0.1,
        learning_rate=1e-3,
    )
    train("two", world_size=2)
    return found
