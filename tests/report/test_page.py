"""The page: self-contained, safe, and right in what it says."""

import base64
import io
import json
import re

import pyarrow.parquet
import pytest
from matplotlib.image import imread

from accel_gpt2.errors import UserError
from accel_gpt2.report import drawing, plots, write_report
from accel_gpt2.report import page as report_page
from accel_gpt2.report.page import render_page
from accel_gpt2.report.read import read_run

from .pages import Page

FIGURES = [
    "loss_curves.png",
    "confusion_matrix.png",
    "reliability_diagram.png",
    "bits_per_byte.png",
]


def report(directory):
    """The page as it is written, figures and all."""
    return Page(write_report(directory).read_text("utf-8"))


def report_text(directory):
    """The page without its figures, which take most of the time."""
    return Page(render_page(read_run(directory), []))


@pytest.fixture(scope="module")
def written(make_run):
    """An evaluated run, its report as first written, and the page of the second writing."""
    directory = make_run(["World", "Sports", "Business"])
    first = write_report(directory).read_text("utf-8")
    return directory, first, report(directory)


def change_metrics(directory, **changes):
    path = directory / "evaluation" / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_nothing_is_requested_from_outside(written):
    """Every source is a data URI; no script, style sheet, font or link leaves the page."""
    _, _, page = written
    sources = [x for x in page.attributes if x[1] in {"src", "srcset", "href", "action", "data"}]
    assert len(sources) == 2 * len(FIGURES)
    assert all(value.startswith("data:image/png;base64,") for _, _, value in sources)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    without_pictures = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page.html)
    assert not re.search(r"https?:|//|url\(|@import", without_pictures)


def test_the_pictures_are_the_files_beside_the_page(written):
    """Four PNGs are written, embedded and joined by a dark one each; a second page is equal."""
    directory, first, page = written
    assert page.html == first
    folder = directory / "evaluation"
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(FIGURES)
    embedded = [
        base64.b64decode(value.partition(",")[2])
        for tag, name, value in page.attributes
        if (tag, name) == ("img", "src")
    ]
    assert embedded == [(folder / name).read_bytes() for name in FIGURES]
    dark = [value for tag, name, value in page.attributes if (tag, name) == ("source", "srcset")]
    assert len(set(dark)) == 4
    assert all(png.startswith(b"\x89PNG\r\n\x1a\n") for png in embedded)


def test_text_from_data_is_escaped(make_run):
    """Markup in class names, examples, command and recipe is shown, never run."""
    evil = "<script>alert(1)</script>"
    directory = make_run([evil, "b & c", '"><img src=x>'])
    (directory / "command.txt").write_text(f"train --dataset {evil}")
    (directory / "environment.json").write_text(json.dumps({evil: "<img src=http://x>"}))
    change_metrics(directory, model=evil, baseline={"name": evil, "accuracy": 0.5})
    page = report_text(directory)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.text.count(evil) >= 5


def test_the_verdict_holds_the_metrics(evaluated_run):
    """The first paragraph has accuracy, interval, baseline, test, majority, time and cost."""
    metrics = json.loads((evaluated_run / "evaluation" / "metrics.json").read_text())
    verdict = report_text(evaluated_run).verdict
    low, high = metrics["accuracy_interval_95"]
    baseline = metrics["baseline"]
    test = baseline["mcnemar"]
    assert f"gets {metrics['accuracy']:.1%} of 600 test documents right" in verdict
    assert f"(95% interval {100 * low:.1f}–{100 * high:.1f}%)" in verdict
    assert f"TF-IDF + logistic regression, gets {baseline['accuracy']:.1%} right" in verdict
    assert f"{test['only_a']} documents that only this run gets right" in verdict
    assert f"get {metrics['majority_class_accuracy']:.1%} right" in verdict
    assert "Training took 5 min 42 s for 1.97M document tokens" in verdict
    assert "its cost is unknown" in verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "p_value", "sentences"),
    [
        (0.90, 0.85, 1e-9, ["5.0 points ahead of it", "is significant", "p < 0.0001"]),
        (0.85, 0.90, 0.03, ["5.0 points behind it", "is significant", "p = 0.03"]),
        (0.85, 0.86, 0.2, ["1.0 points behind it", "may well be chance", "p = 0.2"]),
        (0.85, 0.85, 1.0, ["level with it", "may well be chance", "p = 1"]),
    ],
)
def test_the_verdict_on_the_baseline(evaluated_run, ours, theirs, p_value, sentences):
    """Ahead, behind, level, significant or not: each is said as it is."""
    change_metrics(
        evaluated_run,
        accuracy=ours,
        baseline={
            "name": "TF-IDF",
            "accuracy": theirs,
            "accuracy_difference_interval_95": [-0.021, 0.014],
            "mcnemar": {"p_value": p_value, "only_a": 7, "only_b": 9},
        },
    )
    verdict = report_text(evaluated_run).verdict
    for sentence in [*sentences, "95% interval −2.1 to +1.4"]:
        assert sentence in verdict


def test_a_price_is_shown(evaluated_run):
    """Where a price was set the cost stands in the verdict."""
    change_metrics(evaluated_run, training={"seconds": 3600.0, "cost_usd": 1.987})
    assert "Training took 1 h 00 min and cost $1.99." in report_text(evaluated_run).verdict


def test_tables_hold_every_class_and_fact(evaluated_run):
    """Per-class recall, calibration numbers, treatments, recipe and command are on the page."""
    metrics = json.loads((evaluated_run / "evaluation" / "metrics.json").read_text())
    text = report_text(evaluated_run).text
    for name, recall in metrics["recall"].items():
        support = sum(metrics["confusion_matrix"][metrics["class_names"].index(name)])
        assert re.search(rf"{name}\s*{support:,}\s*{recall:.1%}", text), name
    for kind in ("nll", "brier", "ece"):
        assert f"{metrics['raw'][kind]:.3f}" in text
        assert f"{metrics['calibrated'][kind]:.3f}" in text
    assert "documents that occur in the test split were left out of training" in text
    assert "row 128: Oil prices rise <b>again</b>" in text
    assert "accelerate launch launch/train.py --model gpt2-tiny --dataset ag_news" in text
    assert "tokenizer_vocab_size" in text
    assert "2.13.0+cpu" in text


def test_a_class_that_its_own_model_does_not_win_is_named():
    """The caption of the heatmap says for which classes the diagonal is not the lowest."""
    names = ["World", "Sports", "Business"]
    good = report_page._bits_per_byte_caption([[1.0, 1.1, 1.2], [1.1, 1.0, 1.2], [3, 2, 1]], names)
    assert "It is, in every row." in good
    bad = report_page._bits_per_byte_caption([[1.0, 1.1, 1.2], [1.0, 1.1, 1.2], [None] * 3], names)
    assert "It is not for Sports: another class's model" in bad


def test_a_run_without_evaluation_says_what_to_type(trained_run):
    """It has its loss curves, and the command is quoted so that it can be pasted."""
    page = report(trained_run)
    assert [p.name for p in (trained_run / "evaluation").glob("*.png")] == ["loss_curves.png"]
    assert f"accel-gpt2 evaluate '{trained_run}'" in page.text
    assert "3 models have been trained, for 120 steps at most" in page.text
    assert "Confusion matrix" not in page.text
    assert "Recall" not in page.text


def of_objective(directory, objective):
    """The run's recipe says another objective."""
    path = directory / "recipe.yaml"
    path.write_text(path.read_text().replace("objective: generative", f"objective: {objective}"))
    assert f"objective: {objective}" in path.read_text()


def with_one_curve(directory, **validation):
    """The log is that of one model of all classes, with these values in its validation rows."""
    path = directory / "log.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [row for row in rows if row.get("class_index") == 0]
    for row in kept:
        row["class_name"] = "all classes"
        if row["event"] == "evaluate":
            del row["validation_bits_per_token"], row["validation_bits_per_byte"]
            row.update(validation)
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


def test_a_classification_head_has_its_own_words(evaluated_run):
    """One model of all classes, bits per document, scores that are posteriors, no bits per byte."""
    of_objective(evaluated_run, "classification")
    with_one_curve(evaluated_run, validation_bits_per_document=0.625)
    change_metrics(evaluated_run, bits_per_byte=None, bits_per_token=None, baseline=None)
    path = evaluated_run / "evaluation" / "scores.parquet"
    table = pyarrow.parquet.read_table(path)
    names = [name.replace("log_likelihood", "log_probability") for name in table.column_names]
    pyarrow.parquet.write_table(table.rename_columns(names), path)
    page = report_text(evaluated_run)
    assert "gpt2-tiny with a classification head gets" in page.verdict
    assert "“Raw” is what the classification head says" in page.text
    assert "1.38M parameters ·" in page.text
    assert re.search(r"Bits per document.* all classes ?– ?– ?– ?– ?0\.625", page.text)
    assert "Surest mistakes" in page.text
    assert "baseline" not in page.verdict


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("masked_lm", "One masked gpt2-tiny model per class gets"),
        ("hybrid", "One gpt2-tiny model per class, trained together with a discriminative term,"),
    ],
)
def test_other_language_models_have_their_words(evaluated_run, objective, words):
    """The first sentence says what was trained."""
    of_objective(evaluated_run, objective)
    assert words in report_text(evaluated_run).verdict


def test_a_base_for_adapters_is_not_to_be_evaluated(trained_run):
    """The page does not name a command that would be refused."""
    of_objective(trained_run, "unconditional")
    text = report_text(trained_run).text
    assert "there is nothing to evaluate" in text
    assert "accel-gpt2 evaluate" not in text


def test_a_run_that_has_only_begun(trained_run):
    """Before the first logged step the page says so and has no figure."""
    (trained_run / "log.jsonl").unlink()
    page = report(trained_run)
    assert "No training step has been logged yet" in page.text
    assert "img" not in page.tags


def test_the_least_that_metrics_can_hold(evaluated_run):
    """Without baseline, calibration or training record the page still stands."""
    path = evaluated_run / "evaluation" / "metrics.json"
    least = {"accuracy": 0.5, "class_names": ["a", "b"], "confusion_matrix": [[1, 1], [1, 1]]}
    path.write_text(json.dumps(least))
    for name in ("log.jsonl", "plan.json", "environment.json", "command.txt"):
        (evaluated_run / name).unlink()
    (evaluated_run / "evaluation" / "scores.parquet").unlink()
    page = report(evaluated_run)
    assert "model per class gets 50.0% of them right." in page.text
    assert page.tags.count("img") == 1


def test_notices_reach_the_page(evaluated_run):
    """What could not be read is said on the page."""
    (evaluated_run / "plan.json").write_text("{")
    assert "plan.json could not be read and is left out." in report_text(evaluated_run).text


def test_a_directory_that_is_no_run_is_left_alone(tmp_path):
    """Nothing is written where there is no run."""
    with pytest.raises(UserError, match="is not a run directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_light_and_dark_differ():
    """The dark version is drawn on the dark card, the light one on white."""
    for theme, expected in ((drawing.LIGHT, 1.0), (drawing.DARK, 0x16 / 255)):
        png = plots.confusion_matrix([[5, 1], [0, 4]], ["a", "b"], theme)
        assert imread(io.BytesIO(png))[0, 0, 0] == pytest.approx(expected)
