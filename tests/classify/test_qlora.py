"""A run on a base in 4 bits: trained, stopped, resumed, evaluated, and asked."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from accel_gpt2.classify.evaluate import evaluate_run
from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.predict import load_classifier
from accel_gpt2.classify.prepare import prepare_data
from accel_gpt2.classify.run import open_run
from accel_gpt2.classify.scores import Scorers
from accel_gpt2.data.sources import load_text_data
from accel_gpt2.data.tokenized import Texts
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import ResolvedRecipe
from accel_gpt2.train.checkpoint import list_checkpoints, read_weights
from accel_gpt2.train.loop import validation_scores_path
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.scoring import score_documents
from tests.conftest import write_texts

from .conftest import resolve_tiny
from .runs import assert_same_models, losses, train_and_stop

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def resolved(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> ResolvedRecipe:
    """Two classes on a tiny model that was trained before."""
    folder = tmp_path_factory.mktemp("texts")
    return resolve_tiny(
        write_texts(folder / "texts.csv", documents_per_class=30, num_classes=2),
        model=str(next(trained_run.glob("class-0-*/final"))),
        init="pretrained",
        tokenizer="auto",
        finetuning="qlora",
        learning_rate=3e-3,
        gradient_checkpointing=True,
    )


@pytest.fixture(scope="module")
def run(
    resolved: ResolvedRecipe, tmp_path_factory: pytest.TempPathFactory, session_cache: Path
) -> Path:
    """Trained without a stop, and evaluated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
        directory = tmp_path_factory.mktemp("runs") / "qlora"
        fit(resolved, directory, quiet=True)
        evaluate_run(directory, baseline=False, quiet=True)
    return directory


def test_it_learns_and_keeps_adapters_alone(run: Path, trained_run: Path) -> None:
    """The loss falls, checkpoints and `final/` are adapters, and the parameters are counted."""
    of_other_class = [loss for index, _, loss in losses(run) if index == 1]  # not the base's
    assert np.mean(of_other_class[-3:]) < np.mean(of_other_class[:3]) - 0.2
    base = load_file(next(trained_run.glob("class-0-*/final")) / "model.safetensors")
    checkpoints = [x for part in sorted(run.glob("class-*")) for x in list_checkpoints(part)]
    assert len(checkpoints) == 4
    for checkpoint in checkpoints:
        weights = read_weights(checkpoint)
        assert weights
        assert all("lora_" in name for name in weights)
    adapter = sum(tensor.numel() for tensor in weights.values())
    for final in run.glob("class-*/final"):
        assert sum(x.numel() for x in load_file(final / "adapter_model.safetensors").values()) == (
            adapter
        )
    plan = json.loads((run / "plan.json").read_text())
    assert plan["num_trainable_parameters"] == adapter
    assert plan["num_parameters"] == adapter + sum(tensor.numel() for tensor in base.values())
    assert "BitsAndBytesConfig" in (run / "README.md").read_text()


def test_a_stop_changes_nothing(run: Path, resolved: ResolvedRecipe, tmp_path: Path) -> None:
    """Stopped in the second class and started again: bit for bit the run that was not."""
    train_and_stop(resolved, tmp_path / "halves", 22)
    assert list(tmp_path.glob("halves/class-1-*/checkpoint-*"))
    assert not list(tmp_path.glob("halves/class-1-*/final"))
    fit(resolved, tmp_path / "halves", quiet=True)
    assert_same_models(tmp_path / "halves", run)
    assert losses(tmp_path / "halves") == losses(run)


def test_scores_are_those_of_training(run: Path, resolved: ResolvedRecipe) -> None:
    """What is loaded gives the validation documents the scores of the best step, bit for bit."""
    opened = open_run(run)
    accelerator = build_accelerator(resolved.recipe)
    validation = prepare_data(resolved.recipe, progress=False).validation
    for index, (part, record) in enumerate(
        zip(opened.parts, opened.training_records(), strict=True)
    ):
        scores = score_documents(
            Scorers(opened).load(index).to(accelerator.device),
            validation,
            micro_batch_tokens=resolved.recipe.micro_batch_tokens,
            accelerator=accelerator,
        )
        kept = np.load(validation_scores_path(part.directory, record.best_step))
        np.testing.assert_array_equal(scores, kept)


def test_a_prediction_has_the_likelihoods_of_the_evaluation(
    run: Path, resolved: ResolvedRecipe
) -> None:
    """The same text has the same log-likelihoods wherever it is asked for."""
    table: Any = pq.read_table(run / "evaluation" / "scores.parquet").to_pandas()
    texts = list(Texts(load_text_data(resolved.recipe, progress=False).test))
    assert len(texts) == len(table) > 5
    predictions = load_classifier(run).predict(texts)
    for index, name in enumerate(("kitchen", "river")):
        found = [(x.log_likelihoods or {})[name] for x in predictions]
        np.testing.assert_allclose(found, table[f"log_likelihood_{index}"], rtol=1e-6)
    # The classes' adapters are not the same one.
    assert (table["log_likelihood_0"] != table["log_likelihood_1"]).all()


def test_scoring_without_bitsandbytes_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another base would give other likelihoods, so there is no way around it."""
    real = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "bitsandbytes" else real(name, package)

    classifier = load_classifier(run)
    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(UserError, match="needs bitsandbytes, which is not installed"):
        classifier.predict(["the old boat"])
