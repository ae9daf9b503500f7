"""`bench`: real steps on this machine, and a plan that knows them."""

import json
from pathlib import Path

import pytest

from accel_gpt2.plan.calibration import CALIBRATION_FILE, read_records
from accel_gpt2.plan.data import dataset_statistics
from accel_gpt2.recipe import Layer
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.trace.speed import draw_lengths

from .conftest import CommandLine

_TINY = ("--model", "gpt2-tiny", "--dataset", "docstrings", "--max-length", "32")


def test_a_bench_is_recorded_and_changes_the_plan(
    accel_gpt2: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a few real steps the plan rests on the measurement, in a range of 15%."""
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(tmp_path))
    said = accel_gpt2("bench", *_TINY, "--steps", "5", "--json", "--quiet")
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["device"] == "cpu"
    assert found["steps"] == 5
    speed = found["tokens_per_second"]
    ratio = speed["measured"] / speed["predicted"]
    (record,) = read_records(tmp_path / CALIBRATION_FILE).records
    assert record.measured_tokens_per_second == speed["measured"]
    before, after = found["time_seconds"]["before"], found["time_seconds"]["after"]
    assert before["high"] / before["expected"] == pytest.approx(3)
    assert after["high"] / after["expected"] == pytest.approx(1.15)
    assert (after["expected"] > before["expected"]) == (ratio < 1)


def test_bench_measures_only_what_is_here(accel_gpt2: CommandLine) -> None:
    """A profile of a card that is not here is refused, as is what no formula covers."""
    said = accel_gpt2("bench", *_TINY, "--profile", "rtx4070ti")
    assert said.returncode == 2
    assert "no GPU was found here for profile rtx4070ti" in said.stderr
    said = accel_gpt2("bench", "--model", "roberta-tiny", "--set", "objective=masked_lm")
    assert said.returncode == 2
    assert "bench measures GPT-2 language models" in said.stderr


@pytest.mark.parametrize("dataset", ["ag_news", "imdb", "docstrings"])
def test_drawn_lengths_are_like_the_data_sets(dataset: str) -> None:
    """Made-up documents have the data set's mean and context within 6%, its longest one too."""
    recipe = resolve([Layer(origin="test", values={"dataset": dataset, "max_length": 512})]).recipe
    data = dataset_statistics(recipe)
    assert data is not None
    lengths = draw_lengths(data, recipe, 500)
    predicted = (lengths - 1).astype(float)
    assert predicted.mean() == pytest.approx(data.mean_tokens, rel=0.06)
    assert (predicted**2).sum() / predicted.sum() == pytest.approx(
        data.mean_context_tokens, rel=0.06
    )
    assert lengths.max() == data.longest_tokens
