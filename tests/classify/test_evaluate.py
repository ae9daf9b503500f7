"""Evaluating and predicting: the arithmetic over a run's models, and what is left on the disk."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from accel_gpt2.classify.calibration import Calibration, calibrated_log_probabilities
from accel_gpt2.classify.evaluate import evaluate_run
from accel_gpt2.classify.predict import load_classifier
from accel_gpt2.classify.run import open_run
from accel_gpt2.errors import UserError


@pytest.fixture(scope="module")
def evaluated(trained_run: Path, session_cache: Path) -> tuple[Path, dict[str, Any]]:
    """The trained run, and its metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
        return trained_run, evaluate_run(trained_run, quiet=True)


def test_metrics_follow_from_the_scores(evaluated: tuple[Path, dict[str, Any]]) -> None:
    """metrics.json is what scores.parquet, the priors and the calibration give, recomputed here."""
    run, metrics = evaluated
    assert json.loads((run / "evaluation" / "metrics.json").read_text()) == metrics
    table = pq.read_table(run / "evaluation" / "scores.parquet").to_pandas()
    scores = table[[f"log_likelihood_{index}" for index in range(3)]].to_numpy()
    plan = json.loads((run / "plan.json").read_text())
    prior = np.log(np.array(plan["class_counts"]) / sum(plan["class_counts"]))
    labels = table["label"].to_numpy()
    predictions = (scores + prior).argmax(axis=1)
    assert (predictions == table["prediction"]).all()
    assert metrics["accuracy"] == pytest.approx((predictions == labels).mean())
    assert metrics["num_documents"] == len(labels)
    calibrated = calibrated_log_probabilities(
        Calibration.read(run / "calibration.json", 3), scores, prior, table["num_tokens"].to_numpy()
    )
    nll = -calibrated[np.arange(len(labels)), labels].mean()
    assert metrics["calibrated"]["nll"] == pytest.approx(nll)
    bits = -scores[labels == 1, 2].sum() / math.log(2)
    expected = bits / table["num_bytes"][labels == 1].sum()
    assert metrics["bits_per_byte"][1][2] == pytest.approx(expected)


def test_scores_are_plain_transformers_sums(evaluated: tuple[Path, dict[str, Any]]) -> None:
    """log p(x|c) is the sum over all tokens after BOS, EOS included, of the model in final/."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = evaluated
    prediction = load_classifier(run).predict(["the old boat saw some water"])[0]
    for index, name in enumerate(open_run(run).class_names):
        final = next(run.glob(f"class-{index}-*/final"))
        tokenizer = AutoTokenizer.from_pretrained(final)
        end = tokenizer.eos_token_id
        text = tokenizer("the old boat saw some water", add_special_tokens=False).input_ids
        ids = torch.tensor([[end, *text, end]])
        model = AutoModelForCausalLM.from_pretrained(final).eval()
        with torch.no_grad():
            logits = model(ids).logits.log_softmax(-1)
        expected = logits[0, :-1].gather(1, ids[0, 1:, None]).sum().item()
        assert prediction.log_likelihoods[name] == pytest.approx(expected, abs=1e-3)
        assert prediction.num_tokens == ids.shape[1] - 1


def test_second_evaluation_scores_nothing_again(
    evaluated: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores stay valid while models and documents are the same."""
    run, metrics = evaluated
    again = evaluate_run(run, quiet=True)
    assert "scoring under" not in capsys.readouterr().err
    del again["baseline"]["seconds"]
    expected = json.loads(json.dumps(metrics))
    del expected["baseline"]["seconds"]
    assert again == expected


def test_damaged_scores_are_computed_again(
    evaluated: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A truncated scores.parquet costs time, not correctness."""
    run = tmp_path / "copy"
    shutil.copytree(evaluated[0], run, symlinks=True)
    scores = run / "evaluation" / "scores.parquet"
    scores.write_bytes(scores.read_bytes()[:100])
    again = evaluate_run(run, quiet=True)
    assert capsys.readouterr().err.count("scoring under") == 3
    assert again["accuracy"] == evaluated[1]["accuracy"]


def _put_weights(final: Path, content: bytes) -> None:
    """Other weights in a `final/`, and a manifest that says so."""
    (final / "model.safetensors").write_bytes(content)
    manifest = json.loads((final / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (final / "manifest.json").write_text(json.dumps(manifest))


def test_scores_of_another_model_or_other_documents_are_not_reused(
    evaluated: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept scores belong to one model and one text: what has changed is scored again."""
    run = tmp_path / "copy"
    shutil.copytree(evaluated[0], run, symlinks=True)
    first, second = (next(run.glob(f"class-{index}-*/final")) for index in (0, 1))
    _put_weights(first, (second / "model.safetensors").read_bytes())
    evaluate_run(run, quiet=True)
    assert capsys.readouterr().err.count("scoring under") == 1
    table = pq.read_table(run / "evaluation" / "scores.parquet").to_pandas()
    assert (table["log_likelihood_0"] == table["log_likelihood_1"]).all()

    other = tmp_path / "other.csv"
    for last in ("old oven", "fresh bread"):
        other.write_text(f"text,label\nboat and water,river\nnear the moon,orbit\n{last},kitchen\n")
        evaluate_run(run, dataset=str(other), split="test", quiet=True)
        assert capsys.readouterr().err.count("scoring under") == 3, last


def test_another_data_set_has_its_own_folder(
    evaluated: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Labels of the other data set are mapped by name; the run's own evaluation stays."""
    other = tmp_path / "other.csv"
    other.write_text("text,label\nboat and water,river\nnear the moon,orbit\nold oven,kitchen\n")
    before = (evaluated[0] / "evaluation" / "metrics.json").read_text()
    metrics = evaluate_run(evaluated[0], dataset=str(other), split="test", quiet=True)
    assert metrics["num_documents"] == 3
    assert np.array(metrics["confusion_matrix"]).sum(axis=1).tolist() == [1, 1, 1]
    assert (evaluated[0] / "evaluation" / "metrics.json").read_text() == before


def test_predictions(evaluated: tuple[Path, dict[str, Any]]) -> None:
    """Probabilities add up to one, the label is Bayes' rule, empty and long texts are answered."""
    classifier = load_classifier(evaluated[0])
    texts = ["rocket thrust gravity moon planet", "", "oven bread salt butter plate fry " * 60]
    predictions = classifier.predict(texts)
    assert [prediction.truncated for prediction in predictions] == [False, False, True]
    for prediction in predictions:
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        assert sum(prediction.raw_probabilities.values()) == pytest.approx(1)
        assert set(prediction.log_likelihoods) == {"kitchen", "orbit", "river"}
        assert prediction.label == max(
            prediction.raw_probabilities, key=prediction.raw_probabilities.__getitem__
        )
    assert predictions[0].label == "orbit"
    assert predictions[2].label == "kitchen"
    assert classifier.predict([]) == []


def test_alone_or_together_gives_the_same_scores(
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    """Which texts share a batch never changes a score beyond 1e-4."""
    classifier = load_classifier(evaluated[0])
    texts = ["moon", "the old bridge near deep water and fish", "a spoon and bread"]
    together = classifier.predict(texts)
    for text, joint in zip(texts, together, strict=True):
        (alone,) = classifier.predict([text])
        assert alone.log_likelihoods == pytest.approx(joint.log_likelihoods, abs=1e-4)


def test_what_is_no_run_is_refused(tmp_path: Path, evaluated: tuple[Path, dict[str, Any]]) -> None:
    """Neither an empty folder nor a run with a class missing can be evaluated."""
    with pytest.raises(UserError, match="is not a run directory"):
        evaluate_run(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(evaluated[0], copy, symlinks=True)
    shutil.rmtree(next(copy.glob("class-1-*")) / "final")
    with pytest.raises(UserError, match=r"not trained to the end: orbit is missing"):
        load_classifier(copy)


def test_changed_text_is_not_evaluated(
    evaluated: tuple[Path, dict[str, Any]], texts_file: Path, tmp_path: Path
) -> None:
    """After the data file has grown, its test split may hold documents that were trained on."""
    run = tmp_path / "copy"
    shutil.copytree(evaluated[0], run, symlinks=True)
    changed = tmp_path / "texts.csv"
    changed.write_text(texts_file.read_text() + "rocket moon probe,orbit\n")
    recipe = (run / "recipe.yaml").read_text().replace(str(texts_file), str(changed))
    (run / "recipe.yaml").write_text(recipe)
    with pytest.raises(UserError, match=r"has changed since .* was trained"):
        evaluate_run(run, quiet=True)
