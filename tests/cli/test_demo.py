"""The demo: a second call shows what the first has done, and nothing older."""

import json
import os
from pathlib import Path

import pytest

from accel_gpt2.cli.demo import finished_metrics, run_demo
from accel_gpt2.cli.evaluate import show_metrics
from accel_gpt2.cli.launcher import Launch

METRICS = {
    "model": "gpt2-tiny",
    "accuracy": 0.912,
    "accuracy_interval_95": [0.9, 0.92],
    "macro_f1": 0.91,
    "calibrated": {"nll": 0.25, "ece": 0.02},
    "majority_class_accuracy": 0.4,
    "baseline": {
        "name": "TF-IDF + logistic regression",
        "accuracy": 0.95,
        "accuracy_interval_95": [0.94, 0.96],
        "macro_f1": 0.949,
    },
}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run directory that was trained at time 1000 and evaluated at time 2000."""
    run = tmp_path / "demo"
    (run / "class-0-torch" / "final").mkdir(parents=True)
    (run / "evaluation").mkdir()
    (run / "recipe.yaml").write_text("{}", "utf-8")
    (run / "evaluation" / "metrics.json").write_text(json.dumps(METRICS), "utf-8")
    (run / "evaluation" / "report.html").touch()
    for path in (run / "recipe.yaml", run / "class-0-torch" / "final"):
        os.utime(path, (1000, 1000))
    os.utime(run / "evaluation" / "metrics.json", (2000, 2000))
    return run


def test_what_is_done_is_only_shown(finished: Path) -> None:
    """Nothing is launched or evaluated when the evaluation is newer than the models."""

    def launcher(launch: Launch) -> int:
        raise AssertionError(launch)

    metrics, report = run_demo(finished, quiet=True, debug=False, launcher=launcher)
    assert metrics == METRICS
    assert report == finished / "evaluation" / "report.html"


@pytest.mark.parametrize("newer", ["class-0-torch/final", "recipe.yaml"])
def test_a_newer_model_or_recipe_is_not_done(finished: Path, newer: str) -> None:
    """An evaluation that is older than what it evaluates does not count."""
    assert finished_metrics(finished) == METRICS
    os.utime(finished / newer, (3000, 3000))
    assert finished_metrics(finished) is None


@pytest.mark.parametrize("missing", ["evaluation/metrics.json", "evaluation/report.html"])
def test_a_missing_part_is_not_done(finished: Path, missing: str) -> None:
    """Without metrics or report, the evaluation runs again."""
    (finished / missing).unlink()
    assert finished_metrics(finished) is None


def test_damaged_metrics_are_not_done(finished: Path) -> None:
    """A half-written metrics.json is written again."""
    (finished / "evaluation" / "metrics.json").write_text('{"accuracy":', "utf-8")
    assert finished_metrics(finished) is None


def test_the_table_shows_both_whichever_wins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classifier, baseline and majority class, with what is known of each."""
    monkeypatch.setenv("COLUMNS", "80")
    show_metrics(METRICS)
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if "0." in line]
    assert " ".join(rows[0]) == "gpt2-tiny per class 0.912 0.900-0.920 0.910 0.250 0.020"
    assert rows[1][-4:] == ["regression", "0.950", "0.940-0.960", "0.949"]
    assert rows[2] == ["majority", "class", "0.400"]
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(("calibrated", "said"), [(0.925, True), (0.915, False)])
def test_a_calibration_that_changes_the_answer_is_mentioned(
    capsys: pytest.CaptureFixture[str], calibrated: float, said: bool
) -> None:
    """From one point on; below that it is noise."""
    block = {**METRICS["calibrated"], "accuracy": calibrated}
    show_metrics({**METRICS, "calibrated": block})
    assert (f"the accuracy is {calibrated}" in capsys.readouterr().err) == said
