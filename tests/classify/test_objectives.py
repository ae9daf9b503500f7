"""Runs of the other objectives: trained, stopped, gone on, evaluated, read by plain libraries."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from accel_gpt2.classify.evaluate import evaluate_run
from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.predict import load_classifier
from accel_gpt2.classify.run import open_run
from accel_gpt2.classify.scores import score_texts, token_scores_path
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.train.processes import build_accelerator

from .conftest import read_log, resolve_tiny
from .runs import assert_close_models, assert_same_models, losses, train_and_stop

OBJECTIVES: dict[str, dict[str, Any]] = {
    "hybrid": {"objective": "hybrid"},
    "classification": {"objective": "classification"},
    "encoder": {"objective": "classification", "model": "roberta-tiny", "learning_rate": 2e-3},
    "masked_lm": {"objective": "masked_lm", "model": "roberta-tiny"},
    "unconditional": {"objective": "unconditional"},
}
CLASSIFIERS = [name for name in OBJECTIVES if name != "unconditional"]


@pytest.fixture(scope="module", params=list(OBJECTIVES))
def run(
    request: pytest.FixtureRequest,
    texts_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    session_cache: Path,
) -> Path:
    """A finished run of each objective, named after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
        folder = tmp_path_factory.mktemp("objectives") / request.param
        fit(resolve_tiny(texts_file, **OBJECTIVES[request.param]), folder, quiet=True)
    return folder


def test_stopped_and_resumed_is_the_same(run: Path, texts_file: Path, tmp_path: Path) -> None:
    """Dropout, masks and the order of documents go on as if nothing had happened, to the bit."""
    resolved = resolve_tiny(texts_file, **OBJECTIVES[run.name])
    train_and_stop(resolved, tmp_path / "run", 9)
    assert not list((tmp_path / "run").glob("class-*/final"))
    fit(resolved, tmp_path / "run", quiet=True)
    assert_same_models(tmp_path / "run", run)
    assert losses(tmp_path / "run") == losses(run)
    if run.name in CLASSIFIERS:
        read = [(folder / "calibration.json").read_text() for folder in (run, tmp_path / "run")]
        assert read[0] == read[1]


def test_accumulation_is_one_batch(run: Path, texts_file: Path, tmp_path: Path) -> None:
    """Micro batches of one or two documents train the model of whole global batches."""
    changes = {**OBJECTIVES[run.name], "dropout": 0.0, "adam_epsilon": 1e-5, "max_steps": 4}
    for tokens in (4096, 48):
        fit(
            resolve_tiny(texts_file, **changes, micro_batch_tokens=tokens),
            tmp_path / str(tokens),
            quiet=True,
        )
    assert_close_models(tmp_path / "48", tmp_path / "4096", rtol=1e-4)


def test_a_finished_run_is_not_trained_again(
    run: Path, texts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All final models stand for the part that made them."""
    finals = sorted(run.glob("class-*/final/manifest.json"))
    assert len(finals) == json.loads((run / "plan.json").read_text())["num_models"]
    before = [path.stat().st_mtime_ns for path in finals]
    fit(resolve_tiny(texts_file, **OBJECTIVES[run.name]), run, quiet=True)
    assert "is trained already" in capsys.readouterr().err
    assert [path.stat().st_mtime_ns for path in finals] == before


def test_evaluation_and_prediction(run: Path) -> None:
    """Better than chance on words of three made-up languages, and both ways agree."""
    if run.name == "unconditional":
        with pytest.raises(UserError, match="tells none apart: fine-tune it with --model"):
            evaluate_run(run, quiet=True)
        return
    metrics = evaluate_run(run, quiet=True)
    assert metrics["accuracy"] > 0.5, run.name
    discriminative = metrics["objective"] == "classification"
    assert (metrics["bits_per_byte"] is None) == discriminative
    table = pq.read_table(run / "evaluation" / "scores.parquet").to_pandas()
    kind = "log_probability" if discriminative else "log_likelihood"
    scores = table[[f"{kind}_{index}" for index in range(3)]].to_numpy()
    opened = open_run(run)
    assert (table["prediction"] == (scores + opened.log_prior).argmax(axis=1)).all()
    if discriminative:
        np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1.0)
        assert not opened.log_prior.any(), "the posterior has the prior in it"
    texts = ["the old boat saw some water", "very slowly a rocket and the moon"]
    predictions = load_classifier(run).predict(texts)
    found = score_texts(opened, texts, build_accelerator(opened.recipe)).values
    for prediction, row in zip(predictions, found, strict=True):
        assert prediction.label == opened.class_names[int((row + opened.log_prior).argmax())]
        assert (prediction.log_likelihoods is None) == discriminative
        assert sum(prediction.probabilities.values()) == pytest.approx(1)


def test_kept_token_scores_add_up(run: Path) -> None:
    """What accuracy against tokens read is computed from; only causal models have it."""
    if run.name == "unconditional":
        return
    evaluate_run(run, quiet=True)
    scores_path = run / "evaluation" / "scores.parquet"
    if run.name != "hybrid":
        assert not token_scores_path(scores_path, 0).exists()
        return
    table = pq.read_table(scores_path).to_pandas()
    starts = np.cumsum(table["num_tokens"]) - table["num_tokens"]
    for index in range(3):
        flat = np.load(token_scores_path(scores_path, index)).astype(np.float64)
        np.testing.assert_allclose(
            np.add.reduceat(flat, starts), table[f"log_likelihood_{index}"], rtol=1e-6
        )


def test_the_exported_head_classifies_in_plain_transformers(run: Path) -> None:
    """`final/` of a classification run, loaded by the library alone, gives the same posteriors."""
    if run.name not in {"classification", "encoder"}:
        return
    final = run / "class-all" / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    text = "the old boat saw some water"
    end = tokenizer.eos_token_id
    ids = [end, *tokenizer(text, add_special_tokens=False).input_ids, end]
    with torch.no_grad():
        posterior = model(torch.tensor([ids])).logits.softmax(-1)[0]
    prediction = load_classifier(run).predict([text])[0]
    for index, name in model.config.id2label.items():
        assert prediction.raw_probabilities[name] == pytest.approx(
            float(posterior[index]), abs=1e-5
        )


def test_estimates_of_pseudo_log_likelihoods_stand_beside_the_full_one(run: Path) -> None:
    """Each way has its folder and its own calibration; only masked models have the choice."""
    if run.name in {"hybrid", "classification"}:
        with pytest.raises(UsageError, match="which has one way of scoring"):
            evaluate_run(run, pll="shared", quiet=True)
    if run.name != "masked_lm":
        return
    likelihoods = {}
    for pll, folder in (
        ("full", "evaluation"),
        ("shared", "evaluation-shared-masks"),
        ("independent", "evaluation-independent-masks"),
    ):
        metrics = evaluate_run(run, pll=pll, baseline=False, quiet=True)
        assert metrics["baseline"] is None
        assert json.loads((run / folder / "metrics.json").read_text()) == metrics
        assert (run / folder / "calibration.json").is_file()
        table = pq.read_table(run / folder / "scores.parquet").to_pandas()
        likelihoods[pll] = table[[f"log_likelihood_{index}" for index in range(3)]].to_numpy()
    full, shared, independent = likelihoods.values()
    assert not np.allclose(full, shared)
    assert not np.allclose(shared, independent)


def test_the_log_says_what_the_validation_measures(run: Path) -> None:
    """Bits per token of language models, per document of classifiers, both of a hybrid."""
    rows = [row for row in read_log(run) if row["event"] == "evaluate"]
    assert rows
    keys = {key for row in rows for key in row if key.startswith("validation_")}
    per_token = {"validation_bits_per_token", "validation_bits_per_byte"}
    per_document = {"validation_bits_per_document"}
    expected = {
        "hybrid": {"validation_bits_per_token", *per_document},
        "classification": per_document,
        "encoder": per_document,
    }
    assert keys == expected.get(run.name, per_token)
