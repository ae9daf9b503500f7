"""A comparison of every arm, trained here: its numbers, and what a second start does."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from accel_gpt2.catalog.arms import ARMS
from accel_gpt2.classify.fit import fit
from accel_gpt2.cli.comparison_loop import run_comparison
from accel_gpt2.cli.comparison_runs import PreparedComparison, prepare_comparison
from accel_gpt2.cli.launcher import Launch
from accel_gpt2.cli.options import TrainOptions, command_line_layers
from accel_gpt2.errors import ExitCode, StoppedEarly, UsageError, UserError
from accel_gpt2.plan.comparison import select_arms
from accel_gpt2.recipe.layers import read_layer
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.report.comparison_form import read_comparison
from tests.conftest import write_texts

from .runs import assert_same_models, stop_at_question

TINY = (
    "tokenizer_vocab_size=300",
    "global_batch_size=4",
    "max_steps=3",
    "warmup_fraction=0.1",
    "trackers=",
)


def in_this_process(launch: Launch) -> int:
    """Trains what a launcher would, without the seconds that another process takes to start."""
    recipe = launch.run_directory / "recipe.yaml"
    try:
        fit(resolve([read_layer(recipe)]), launch.run_directory, quiet=True)
    except StoppedEarly as stopped:
        return int(stopped.exit_code)
    return 0


def never(launch: Launch) -> int:
    """A launcher for what must not train anything."""
    raise AssertionError(f"trains {launch.run_directory}")


def prepared(texts: Path, directory: Path, arms: str, **options: Any) -> PreparedComparison:
    """A comparison of tiny models that starts from what is in the directory."""
    values: dict[str, object] = {
        "dataset": str(texts),
        "model": options.pop("model", "gpt2-tiny"),
        "max_length": 48,
        "profile": "cpu",
    }
    layers = command_line_layers(values, [*TINY, *options.pop("assignments", ())])
    return prepare_comparison(
        TrainOptions(layers=layers, output_dir=directory, quiet=True),
        select_arms(arms),
        **{"encoder": None, "num_seeds": 1, "train_documents": (), **options},
    )


def compared(
    texts: Path,
    directory: Path,
    arms: str,
    launcher: Callable[[Launch], int] = in_this_process,
    **options: Any,
) -> tuple[dict[str, Any], int]:
    """Run such a comparison: what comparison.json holds, and the exit code.

    Its report is checked to be possible, and not drawn, which takes longer than everything else.
    """
    write_report = options.pop("write_report", read_comparison)
    return run_comparison(
        prepared(texts, directory, arms, **options),
        command="accel-gpt2 compare",
        launcher=launcher,
        write_report=write_report,
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents, two classes."""
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    return write_texts(path, documents_per_class=30, num_classes=2)


@pytest.fixture(scope="module")
def other_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of other words, for the scores out of distribution."""
    rows = [f"zebra violin quark {i} {i * i},{'odd' if i % 2 else 'even'}" for i in range(40)]
    path = tmp_path_factory.mktemp("other") / "other.csv"
    path.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(
    texts: Path,
    other_texts: Path,
    tmp_path_factory: pytest.TempPathFactory,
    session_cache: Path,
) -> Path:
    """A comparison of all arms that nothing interrupted."""
    directory = tmp_path_factory.mktemp("comparisons") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
        _, code = compared(
            texts,
            directory,
            "all",
            other_dataset=str(other_texts),
        )
    assert code == ExitCode.DONE
    gc.freeze()
    return directory


@pytest.fixture(scope="module")
def document(finished: Path) -> dict[str, Any]:
    """Its comparison.json."""
    content: dict[str, Any] = json.loads((finished / "comparison.json").read_text("utf-8"))
    return content


def test_all_arms_are_there(finished: Path, document: dict[str, Any]) -> None:
    """Each that can run here is done, zero-shot says why it is not, and the report can read all."""
    status = {entry["id"]: entry["status"] for entry in document["entries"]}
    assert status == {arm: "missing" if arm == "2" else "done" for arm in ARMS}
    (zero_shot,) = (entry for entry in document["entries"] if entry["id"] == "2")
    assert "gpt2-tiny has random weights here" in zero_shot["why_missing"]
    assert read_comparison(finished)["dataset"] == document["dataset"]
    assert "NaN" not in (finished / "comparison.json").read_text("utf-8")


def done_entries(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries with results."""
    return [entry for entry in document["entries"] if entry["status"] == "done"]


def scores_of(directory: Path, entry: dict[str, Any]) -> Any:
    """The scores.parquet of an entry's first seed, as a pandas table."""
    folder = directory / entry["directories"][0] / ARMS[entry["id"]].evaluation
    return pq.read_table(folder / "scores.parquet").to_pandas()


def test_accuracies_follow_from_the_stored_predictions(
    finished: Path, document: dict[str, Any]
) -> None:
    """Accuracy and macro-F1 are scikit-learn's, of predictions on the same documents for all."""
    tables = {entry["id"]: scores_of(finished, entry) for entry in done_entries(document)}
    assert len(tables) == len(ARMS) - 1
    first = tables["1a"]
    assert np.bincount(first["label"]).tolist() == document["class_counts"]["test"]
    for entry in done_entries(document):
        table, metrics = tables[entry["id"]], entry["metrics"]
        assert (table[["document", "label"]] == first[["document", "label"]]).all(axis=None)
        assert metrics["accuracy"] == pytest.approx((table["prediction"] == table["label"]).mean())
        assert metrics["macro_f1"] == pytest.approx(
            f1_score(table["label"], table["prediction"], average="macro", zero_division=0)
        )
        assert entry["by_seed"]["accuracy"] == [metrics["accuracy"]]
        assert entry["by_seed"]["accuracy_standard_deviation"] is None


def test_the_backbones_of_one_tokenizer_read_the_same_text(
    finished: Path, document: dict[str, Any]
) -> None:
    """Classical arms are given what is left of a document for the language models, to the byte."""
    kept = {
        entry["id"]: scores_of(finished, entry)["num_bytes"].tolist()
        for entry in done_entries(document)
        if entry["id"] in {"1a", "1b", "3", "4", "5", "8"}
    }
    assert len(kept) == 6
    assert all(num_bytes == kept["3"] for num_bytes in kept.values())


def test_every_pair_is_tested(finished: Path, document: dict[str, Any]) -> None:
    """Exact McNemar on the stored predictions, as scipy has it; Holm can only raise a p-value."""
    correct = {}
    for entry in done_entries(document):
        table = scores_of(finished, entry)
        correct[entry["id"]] = (table["prediction"] == table["label"]).to_numpy()
    pairs = document["pairs"]
    assert len(pairs) == len(correct) * (len(correct) - 1) / 2
    for pair in pairs:
        a, b = correct[pair["a"]], correct[pair["b"]]
        assert pair["accuracy_difference"] == pytest.approx(a.mean() - b.mean())
        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        assert (pair["only_a"], pair["only_b"]) == (only_a, only_b)
        expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        assert pair["p_value"] == pytest.approx(expected)
        assert pair["p_value_holm"] >= pair["p_value"]


def test_curves_end_at_the_results(document: dict[str, Any]) -> None:
    """All tokens read is the accuracy; everything answered is the calibrated error; every document
    is in a histogram."""
    by_tokens = []
    for entry in done_entries(document):
        metrics, curves = entry["metrics"], entry["curves"]
        risk = curves["risk_coverage"][-1]
        assert risk["coverage"] == 1.0
        assert risk["risk"] == pytest.approx(1 - metrics["calibrated"]["accuracy"])
        counts = entry["log_ratios"]["counts"]
        assert [sum(counts[name]) for name in document["class_names"]] == (
            document["class_counts"]["test"]
        )
        if curves["tokens_read"] is not None:
            by_tokens.append(entry["id"])
            assert curves["tokens_read"][-1]["accuracy"] == pytest.approx(metrics["accuracy"])
    assert by_tokens == ["3", "4", "8"]  # what reads from left to right and keeps its tokens


def test_text_of_another_kind_is_judged(other_texts: Path, document: dict[str, Any]) -> None:
    """By every entry but the two estimates; a posterior alone has no density to judge by."""
    judged = {
        entry["id"]: entry["out_of_distribution"]
        for entry in done_entries(document)
        if entry["out_of_distribution"] is not None
    }
    assert list(judged) == ["1a", "1b", "3", "4", "5", "6", "7c", "8"]
    for id_, found in judged.items():
        assert found["dataset"] == str(other_texts)
        assert 0 <= found["auroc_max_probability"] <= 1
        assert (found["auroc"] is None) == (id_ in {"1a", "5", "6"})


def test_adapters_stand_on_the_base_of_all_text(finished: Path) -> None:
    """Without pretrained weights arm 4 adapts one language model of the pooled classes."""
    configs = list(finished.glob("arm-4-lora/seed-0/class-*/final/adapter_config.json"))
    assert len(configs) == 2
    for config in configs:
        base = Path(json.loads(config.read_text("utf-8"))["base_model_name_or_path"])
        assert base.resolve() == (finished / "base" / "seed-0" / "class-all" / "final").resolve()


def written(directory: Path) -> dict[Path, float]:
    """When each file below the runs of a comparison was written."""
    files = (path for path in directory.glob("*/*/**/*") if path.is_file())
    return {path: path.stat().st_mtime for path in files}


def test_what_is_done_is_not_done_again(
    finished: Path,
    document: dict[str, Any],
    texts: Path,
    other_texts: Path,
    session_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second start trains nothing, writes into no run, and comes to the same document."""
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
    before = written(finished)
    assert len(before) > 100
    again, code = compared(texts, finished, "all", never, other_dataset=str(other_texts))
    assert code == ExitCode.DONE
    assert written(finished) == before
    changing = {"environment", "date"}
    assert {key: again[key] for key in again if key not in changing} == {
        key: document[key] for key in document if key not in changing
    }


def test_a_missing_evaluation_is_made_without_training(
    finished: Path, texts: Path, tmp_path: Path
) -> None:
    """Of three evaluations of the same models the one that is gone comes back the same."""
    directory = tmp_path / "copy"
    shutil.copytree(finished, directory, symlinks=True)
    metrics = directory / "arm-7-masked-lm" / "seed-0" / "evaluation-shared-masks" / "metrics.json"
    others = metrics.parent.with_name("evaluation-independent-masks") / "metrics.json"
    expected = json.loads(metrics.read_text("utf-8"))
    untouched = others.stat().st_mtime
    metrics.unlink()
    compared(texts, directory, "7a,7b", never)
    assert json.loads(metrics.read_text("utf-8"))["accuracy"] == expected["accuracy"]
    assert others.stat().st_mtime == untouched


def test_another_recipe_is_refused_before_anything_runs(finished: Path, texts: Path) -> None:
    """The run directory says what differs."""
    with pytest.raises(UsageError, match=r"arm-3-generative/seed-0 was started with another recip"):
        prepared(texts, finished, "1,3", assignments=("max_grad_norm=0.5",))


def test_a_classical_arm_is_fitted_anew_for_another_recipe(texts: Path, tmp_path: Path) -> None:
    """It takes seconds, so nobody is sent away; what changed is seen in its numbers."""
    compared(texts, tmp_path / "c", "1", never)
    metrics = tmp_path / "c" / "arm-1-tfidf" / "seed-0" / "evaluation" / "metrics.json"
    assert "on the 45 training documents" in json.loads(metrics.read_text("utf-8"))["description"]
    compared(texts, tmp_path / "c", "1", never, assignments=("train_documents_per_class=5",))
    assert "on the 10 training documents" in json.loads(metrics.read_text("utf-8"))["description"]


def test_seeds_and_learning_curves(texts: Path, tmp_path: Path) -> None:
    """Each point has an accuracy per seed, the last is the full run; seeds keep the test split."""
    document, code = compared(
        texts, tmp_path / "c", "1", never, num_seeds=3, train_documents=[8, 4]
    )
    assert (code, document["seeds"]) == (ExitCode.DONE, [0, 1, 2])
    for entry in document["entries"]:
        points = entry["curves"]["training_documents"]
        everything = max(document["class_counts"]["train"])
        assert [point["documents_per_class"] for point in points] == [4, 8, everything]
        assert [len(point["accuracy"]) for point in points] == [3, 3, 3]
        by_seed = entry["by_seed"]
        assert points[-1]["accuracy"] == by_seed["accuracy"]
        assert by_seed["accuracy_standard_deviation"] == pytest.approx(
            np.std(by_seed["accuracy"], ddof=1)
        )
    splits = [
        pq.read_table(path)["document"].to_pylist()
        for path in tmp_path.glob("c/arm-1-tfidf/*/evaluation/scores.parquet")
    ]
    assert len(splits) == 9
    assert all(split == splits[0] for split in splits)


def test_a_point_with_all_documents_is_the_full_run(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is fitted twice on the same documents, and the person hears why."""
    document, _ = compared(texts, tmp_path / "c", "1a", never, train_documents=[1000])
    most = max(document["class_counts"]["train"])
    said = f"--train-documents 1000: no class has more than {most} training documents"
    assert said in capsys.readouterr().err
    (entry,) = document["entries"]
    assert [x["documents_per_class"] for x in entry["curves"]["training_documents"]] == [most]


def test_a_comparison_that_is_stopped_goes_on(
    finished: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the middle of a training leaves a readable comparison of what is done, and the
    next start ends with the models of one that nothing stopped."""
    directory = tmp_path / "c"
    reports = []
    with monkeypatch.context() as patch:
        stop_at_question(patch, 5)
        with pytest.raises(typer.Exit) as stopped:
            compared(texts, directory, "1a,3", write_report=reports.append)
    assert stopped.value.exit_code == ExitCode.STOPPED
    assert reports == [directory]
    left = read_comparison(directory)
    assert [entry["status"] for entry in left["entries"]] == ["done", "missing"]
    assert left["verdict"][0].startswith("Only TF-IDF + logistic regression (1a) is evaluated")

    document, code = compared(texts, directory, "1a,3")
    assert code == ExitCode.DONE
    assert len(done_entries(document)) == 2
    run = Path("arm-3-generative", "seed-0")
    assert_same_models(directory / run, finished / run)


def test_a_stop_before_a_training_began_leaves_a_report(texts: Path, tmp_path: Path) -> None:
    """A signal while the launcher is still starting ends the comparison too."""

    def stopped(launch: Launch) -> int:
        raise StoppedEarly("Stopped by SIGTERM before the training began.", ExitCode.STOPPED)

    reports: list[Path] = []
    with pytest.raises(StoppedEarly, match="before the training began"):
        compared(texts, tmp_path / "c", "1a,3", stopped, write_report=reports.append)
    assert reports == [tmp_path / "c"]


def test_a_training_that_fails_does_not_end_the_comparison(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is listed with what its trainer said; what stands on it says so; the rest is done, and
    the exit code is the failure's."""
    launched = []

    def failing(launch: Launch) -> int:
        launched.append(launch.run_directory.parent.name)
        status = {"exit_code": 3, "message": "The GPU ran out of memory.", "pid": 1}
        (launch.run_directory / "status.json").write_text(json.dumps(status), "utf-8")
        return 3

    document, code = compared(texts, tmp_path / "c", "1a,3,4", failing)
    assert (code, launched) == (ExitCode.DOES_NOT_FIT, ["arm-3-generative", "base"])
    missing = {entry["id"]: entry["why_missing"] for entry in document["entries"]}
    assert missing == {
        "1a": None,
        "3": "The GPU ran out of memory.",
        "4": "Its base is missing: The GPU ran out of memory.",
    }
    said = capsys.readouterr().err
    assert said.count("The GPU ran out of memory.") == 1  # the launcher has said it the other times


def test_without_any_arm_that_can_run_nothing_is_written(texts: Path, tmp_path: Path) -> None:
    """Zero-shot alone on random weights is an error, not an empty report."""
    with pytest.raises(UserError, match="None of these arms can run here"):
        compared(texts, tmp_path / "c", "2", never)
    assert not (tmp_path / "c").exists()


def test_other_directories_are_left_alone(texts: Path, tmp_path: Path) -> None:
    """A folder with other things in it is not written into, and neither is a file."""
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UsageError, match=r"holds files and no comparison\.json"):
        prepared(texts, tmp_path, "1")
    with pytest.raises(UsageError, match=r"holiday\.jpg is a file"):
        prepared(texts, tmp_path / "holiday.jpg", "1")


def test_data_that_is_not_there_is_said_first(tmp_path: Path) -> None:
    """No arm is tried without its data."""
    with pytest.raises(UserError, match=r"none\.csv"):
        prepared(tmp_path / "none.csv", tmp_path / "c", "1,3")


def test_what_the_arms_decide_has_no_effect_and_is_said(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A seed from `--set` is overruled with a warning."""
    comparison = prepared(texts, tmp_path / "c", "3", assignments=("seed=7",))
    assert comparison.runs[0].recipe.seed == 0
    assert "seed = 7 (from --set) has no effect" in capsys.readouterr().err
