"""The benchmarks of scoring, predicting and scaling, from end to end on next to nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from accel_gpt2.classify.fit import fit
from accel_gpt2.recipe import Layer
from accel_gpt2.recipe.resolving import resolve

_FOLDER = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not _FOLDER.is_dir(), reason="benchmarks are not part of a release")


def _page(script: str, *options: str, output: Path) -> str:
    command = [sys.executable, str(_FOLDER / script), *options, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = output.glob("*.md")
    assert path.read_text(encoding="utf-8") == done.stdout
    return done.stdout


def test_ways_of_scoring_agree_and_bars_are_said(tmp_path: Path) -> None:
    """Every way's scores are the naive loop's; both bars have a number."""
    options = ("--datasets", "ag_news", "--share", "0.05", "--rounds", "1")
    page = _page("scoring_peers.py", *options, output=tmp_path)
    differences = re.findall(r"^\| .* \| (\d\.\de-\d\d) \|$", page, re.MULTILINE)
    assert len(differences) >= 2
    assert max(map(float, differences)) < 1e-5
    assert re.search(r"Times the naive loop: [\d.]+, at least 3 was wanted", page)
    memory = re.search(r"Memory over that of batches: ([\d.]+), at most 0.1 was wanted", page)
    assert memory is not None
    assert 0 < float(memory[1]) < 1


@pytest.mark.slow
def test_predictions_are_timed_from_the_shell(texts_file: Path, tmp_path: Path) -> None:
    """A program of ours and the naive script answer alike; every stage of a start has a time."""
    values = {
        "model": "gpt2-tiny",
        "dataset": str(texts_file),
        "tokenizer_vocab_size": 300,
        "max_length": 512,
        "max_steps": 8,
        "global_batch_size": 8,
        "priors": "uniform",
        "trackers": [],
    }
    run = tmp_path / "run"
    fit(resolve([Layer(origin="test", values=values)]), run, quiet=True, silent=True)
    options = ("--run", str(run), "--texts", "5", "--rounds", "1")
    page = _page("prediction.py", *options, output=tmp_path / "pages")
    assert "5 of 5 answers are the same" in page
    stages = page[page.index("## Where the start goes") :]
    assert len(re.findall(r"^\| .* \| [\d.]+ \| [\d.]+ \|$", stages, re.MULTILINE)) == 8


def test_what_grows_with_what_is_measured(tmp_path: Path) -> None:
    """A row for each number of documents, and a bar between the large ones."""
    options = ("--documents", "10000", "12000", "--classes", "--lengths", "--sizes", "0")
    page = _page("scaling.py", *options, output=tmp_path)
    assert len(re.findall(r"^\| 1[02],000 \|", page, re.MULTILINE)) == 2
    assert len(re.findall(r"at most [\d.]+ was wanted", page)) == 3
