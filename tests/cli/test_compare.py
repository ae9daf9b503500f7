"""`compare` as a person types it: what is refused, what would be run, what is shown."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from accel_gpt2.cli.compare import show_comparison
from tests.cli.conftest import CommandLine
from tests.conftest import write_texts


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A data set of two classes."""
    return write_texts(tmp_path / "texts.csv", documents_per_class=30, num_classes=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arms", "9"], "--arms '9': 9 is no arm; give numbers from 1 to 8 or ids (1a, 1b, 2,"),
        (["--arms", ""], "nothing is no arm"),
        (["--seeds", "0"], "Invalid value for '--seeds'"),
        (["--train-documents", "64,many"], "'many' is no number of documents"),
        (["--train-documents", "0"], "'0' is no number of documents"),
        (["--set", "dropuot=1"], "Did you mean 'dropout'?"),
        (["--profile", "rtx"], "There is no profile 'rtx'."),
        (["--recipe", "none.yaml"], "The recipe none.yaml does not exist."),
        (["--max-length", "2"], "max_length = 2 (from --max-length)"),
        (["--arms", "7", "--encoder", "gpt2-tiny"], "gpt2-tiny has no mask token"),
        (["--arms", "3", "--model", "roberta-base"], "sees a token's right side too"),
    ],
)
def test_a_wrong_command_is_a_sentence_and_exit_code_2(
    accel_gpt2: CommandLine, arguments: list[str], said: str
) -> None:
    """Before anything is loaded or written."""
    ended = accel_gpt2("compare", *arguments)
    assert ended.returncode == 2
    assert said in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize("option", ["--dataset", "--ood"])
def test_data_that_is_not_there(accel_gpt2: CommandLine, texts: Path, option: str) -> None:
    """The data set of the comparison and the other one are looked for first."""
    given = ["--dataset", str(texts), option, "none.csv", "--arms", "1", "--model", "gpt2-tiny"]
    ended = accel_gpt2("compare", *given)
    assert ended.returncode == 1
    assert "none.csv" in ended.stderr
    assert ended.stdout == ""


LOADED = """
import sys
from accel_gpt2.cli.app import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "accelerate", "datasets", "numpy", "sklearn", "matplotlib"}
    print("loaded", *sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


def test_a_dry_run_shows_every_run_and_loads_nothing_heavy(tmp_path: Path) -> None:
    """All of the default comparison, in a moment; what cannot run says why."""
    ended = subprocess.run(
        [sys.executable, "-c", LOADED, "compare", "--model", "gpt2-tiny", "--dry-run", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stderr.splitlines()[-1] == "loaded"
    runs = json.loads(ended.stdout)["runs"]
    assert [run["entries"] for run in runs] == [
        *("1a", "1b", "2", "3", "base", "4", "5", "6", "7a, 7b, 7c", "8")
    ]
    assert runs[3]["directory"] == "runs/compare-imdb-gpt2-tiny/arm-3-generative/seed-0"
    assert runs[3]["outlook"] == "train and evaluate"
    assert runs[2]["outlook"].startswith("cannot run here: gpt2-tiny has random weights")
    assert not any(tmp_path.iterdir())


def test_one_json_document_and_a_report(
    accel_gpt2: CommandLine, texts: Path, tmp_path: Path
) -> None:
    """Arm 1 is fitted within the command: stdout is comparison.json, and the report lies beside."""
    given = ["--dataset", str(texts), "--arms", "1,2", "--model", "gpt2-tiny", "--max-length", "32"]
    options = [*given, "--set", "tokenizer_vocab_size=300", "--output-dir", "c", "--quiet"]
    ended = accel_gpt2("compare", *options, "--json", ACCEL_GPT2_CACHE=str(tmp_path / "cache"))
    assert ended.returncode == 0
    document = json.loads(ended.stdout)
    assert document == json.loads((tmp_path / "c" / "comparison.json").read_text("utf-8"))
    assert [entry["status"] for entry in document["entries"]] == ["done", "done", "missing"]
    assert document["command"] == f"accel-gpt2 compare {' '.join([*options, '--json'])}"
    assert "Warning: Not run: 2. gpt2-tiny has random weights here" in ended.stderr
    assert ended.stderr.endswith("Report: c/report.html\n")
    page = (tmp_path / "c" / "report.html").read_text("utf-8")
    assert document["verdict"][0].split(" (")[0] in page


def shown(entry_id: str, name: str, accuracy: float | None) -> dict[str, Any]:
    """An entry of comparison.json, as far as the table shows it."""
    metrics = {
        "accuracy": accuracy,
        "accuracy_interval_95": [0.85, 0.89],
        "macro_f1": 0.86,
        "training": {"seconds": 95.2},
    }
    return {"id": entry_id, "name": name, "metrics": None if accuracy is None else metrics}


@pytest.mark.parametrize("columns", [80, 160])
def test_the_table_and_the_verdict_fit(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row for each entry, done or missing, and the sentences in whole words."""
    monkeypatch.setenv("COLUMNS", str(columns))
    verdict = ["The winner is " + "well known " * 20, "It cost nothing."]
    entries = [
        shown("1a", "TF-IDF + logistic regression", 0.871),
        shown("7b", "roberta-tiny, shared masks", 0.6),
        shown("2", "gpt2-tiny zero-shot", None),
    ]
    show_comparison({"entries": entries, "verdict": verdict})
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert rows[2:5] == [
        "1a TF-IDF + logistic regression 0.871 0.850-0.890 0.860 1 min 35 s",
        "7b roberta-tiny, shared masks 0.600 0.850-0.890 0.860 1 min 35 s",
        "2 gpt2-tiny zero-shot missing",
    ]
    assert max(map(len, out.splitlines())) <= columns
    assert " ".join(" ".join(rows[5:]).split()) == " ".join(" ".join(verdict).split())
