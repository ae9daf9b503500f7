"""Calibration records of real trainings: what is written, when, and that it harms nothing."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.classify.fit import fit
from accel_gpt2.plan.calibration import CALIBRATION_FILE, read_records
from accel_gpt2.recipe import Layer, ResolvedRecipe, TrainRecipe
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train import calibration
from accel_gpt2.train.calibration import (
    TrainedHere,
    append_record,
    measured_record,
    record_training,
)
from accel_gpt2.train.model import build_model
from accel_gpt2.train.throughput import StepTimer
from tests.conftest import write_texts

_LENGTHS = np.full(40, 30)
_HERE = TrainedHere(gpu=None, device=torch.device("cpu"), num_processes=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _recipe(**values: object) -> TrainRecipe:
    given = {"model": "gpt2-tiny", "tokenizer_vocab_size": 300, **values}
    return resolve([Layer(origin="test", values=given)]).recipe


def _timer(steps: int) -> StepTimer:
    timer = StepTimer()
    for _ in range(steps):
        timer.add(0.5, 100)
    return timer


def test_a_timer_leaves_out_the_first_steps() -> None:
    """Tokens per second are those of the steps after the third."""
    timer = StepTimer()
    for seconds in (100.0, 50.0, 20.0, 1.0, 3.0):
        timer.add(seconds, 200)
    assert timer.num_steps == 2
    assert timer.tokens_per_second == 100.0


def test_a_training_leaves_one_record_for_each_class(tmp_path: Path, cache: Path) -> None:
    """Two classes of 25 steps leave two records with the shape of the model, the speed that the
    log shows too, and the prediction of the formula."""
    texts = write_texts(tmp_path / "texts.csv", documents_per_class=10, num_classes=2)
    recipe = _recipe(
        dataset=str(texts),
        test_split="none",
        global_batch_size=2,
        max_length=32,
        epochs=20.0,
        max_steps=25,
        evaluate_every_steps=1000,
        log_every_steps=1,
        trackers=(),
    )
    resolved = ResolvedRecipe(recipe=recipe, origins={})
    fit(resolved, tmp_path / "run", silent=True, handle_signals=False)
    records = read_records(cache / CALIBRATION_FILE).records
    assert len(records) == 2
    logged = [
        json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    row = MODELS["gpt2-tiny"]
    for number, record in enumerate(records):
        assert (record.device, record.strategy, record.torch) == (
            "cpu",
            "single",
            torch.__version__,
        )
        assert (record.n_layer, record.n_embd) == (row.n_layer, row.n_embd)
        assert f"{torch.get_num_threads()} threads" in record.driver
        assert record.predicted_tokens_per_second is not None
        assert record.measured_tokens_per_second is not None
        assert record.predicted_allocated_bytes
        assert record.measured_allocated_bytes is None  # the CPU's allocator does not tell
        rates = [
            x["tokens_per_second"]
            for x in logged
            if x["event"] == "step" and x["class_index"] == number
        ]
        assert min(rates) < record.measured_tokens_per_second < max(rates)


def test_short_trainings_and_unknown_models_leave_none(cache: Path) -> None:
    """Under 20 timed steps, and what no formula covers, is not recorded."""
    recipe = _recipe()
    model = build_model(recipe, vocab_size=300, eos_token_id=0)
    record_training(model, recipe, _LENGTHS, _timer(22), _HERE)
    head = dataclasses.replace(recipe, objective="classification")
    record_training(model, head, _LENGTHS, _timer(23), _HERE)
    assert not cache.exists()
    record_training(model, recipe, _LENGTHS, _timer(23), _HERE)
    (record,) = read_records(cache / CALIBRATION_FILE).records
    assert record.measured_tokens_per_second == 200.0


def test_a_training_never_fails_for_its_record(cache: Path) -> None:
    """A cache that cannot be written costs the record alone."""
    cache.write_text("a file in the folder's place")
    recipe = _recipe()
    model = build_model(recipe, vocab_size=300, eos_token_id=0)
    record = measured_record(model, recipe, _LENGTHS, _timer(30), _HERE)
    assert record is not None
    with pytest.raises(OSError, match="cache"):
        append_record(record)
    record_training(model, recipe, _LENGTHS, _timer(30), _HERE)


def test_the_file_stays_small(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its limit only the newest half is kept, and a line that was cut off goes alone."""
    monkeypatch.setattr(calibration, "_MOST_RECORDS", 10)
    recipe = _recipe()
    model = build_model(recipe, vocab_size=300, eos_token_id=0)
    record = measured_record(model, recipe, _LENGTHS, _timer(30), _HERE)
    assert record is not None
    path = append_record(dataclasses.replace(record, context_tokens=1.0))
    for number in range(2, 12):
        append_record(dataclasses.replace(record, context_tokens=float(number)))
    kept = [int(x.context_tokens) for x in read_records(path).records]
    assert kept == [7, 8, 9, 10, 11]
    with path.open("a") as file:
        file.write('{"date": "20')  # the machine went down here
    append_record(dataclasses.replace(record, context_tokens=12.0))
    append_record(dataclasses.replace(record, context_tokens=13.0))
    assert [int(x.context_tokens) for x in read_records(path).records][-2:] == [12, 13]
