"""Runs that several tests look at, trained once."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accel_gpt2.classify.fit import fit
from accel_gpt2.recipe import Layer, ResolvedRecipe
from accel_gpt2.recipe.resolving import resolve

Resolve = Callable[..., ResolvedRecipe]


def resolve_tiny(texts_file: Path, **changes: Any) -> ResolvedRecipe:
    """A recipe that trains three classes in a few seconds."""
    values: dict[str, Any] = {
        "model": "gpt2-tiny",
        "dataset": str(texts_file),
        "tokenizer_vocab_size": 300,
        "max_length": 48,
        "global_batch_size": 4,
        "epochs": 2.0,
        "log_every_steps": 1,
        "warmup_fraction": 0.1,
        "trackers": [],
        "dropout": 0.1,
        **changes,
    }
    return resolve([Layer(origin="test", values=values)])


def read_log(run: Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of all tests, for fixtures that live longer than one."""
    return tmp_path_factory.getbasetemp() / "cache"


@pytest.fixture(scope="session")
def trained_run(
    texts_file: Path, tmp_path_factory: pytest.TempPathFactory, session_cache: Path
) -> Path:
    """A finished run of three classes that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
        run = tmp_path_factory.mktemp("runs") / "whole"
        fit(resolve_tiny(texts_file), run, quiet=True)
    # Each class's end collects garbage; what the libraries made at import is none, and is large.
    gc.freeze()
    return run
