"""The benchmarks of a GPU, rehearsed on a CPU with a tiny model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not _FOLDER.is_dir(), reason="benchmarks are not part of a release")


def _rehearse(script: str, output: Path, *, seconds: int) -> None:
    options = ["--device", "cpu", "--sizes", "tiny", "--seconds", str(seconds)]
    done = subprocess.run(
        [sys.executable, str(_FOLDER / script), *options, "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_scores_of_both_products_are_alike(tmp_path: Path) -> None:
    """A row for each data set: rates, and scores that differ by rounding alone."""
    _rehearse("scoring_on_gpu.py", tmp_path, seconds=300)
    (path,) = tmp_path.glob("*-scoring-on-gpu.md")
    rows = re.findall(r"^\| gpt2-tiny \| (.*) \|$", path.read_text(), re.MULTILINE)
    assert [row.split(" | ")[0] for row in rows] == ["ag_news", "imdb"]
    for row in rows:
        _, *rates, _, _, difference, _, _ = row.split(" | ")
        assert all(float(rate.replace(",", "")) > 0 for rate in rates)
        assert 0 < float(difference) < 1e-6


def test_all_sides_train_and_what_there_was_no_time_for_is_named(tmp_path: Path) -> None:
    """Equal losses, a speed for each side that is here, the shares of a step, in both files."""
    _rehearse("gpu_bench.py", tmp_path, seconds=300)
    (path,) = tmp_path.glob("*-training-on-cpu.json")
    found = json.loads(path.read_text())
    (bar,) = found["bars"]
    assert bar["held"]
    assert "the losses differ by" in bar["claim"]
    ours, theirs = found["losses"]["gpt2-tiny"]
    assert abs(ours - theirs) < 1e-4 < 6 < theirs < 6.6  # ln 512 = 6.24, and weights are random
    sides = [row["case"]["side"] for row in found["rows"]]
    assert sides[:4] == ["ours", "Trainer padded", "Trainer grouped", "Trainer flattened"]
    assert all(row["tokens_per_second"] > 0 and row["num_steps"] >= 8 for row in found["rows"])
    assert len(found["rows"]) == 7
    assert found["left_out"] == ["gpt2-tiny, 64: nanoGPT: no --nanogpt folder is given"]
    assert len(found["breakdowns"]) == 3
    for shares in found["breakdowns"].values():
        assert sum(shares.values()) == pytest.approx(1)
        assert {"matmul", "attention", "loss", "optimizer", "elementwise"} <= shares.keys()
    page = path.with_suffix(".md").read_text()
    assert len(re.findall(r"^\| gpt2-tiny, .*\d", page, re.MULTILINE)) == 7 + 3
