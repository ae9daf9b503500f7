"""Calibration records: read whatever the file holds, and used for what they are alike to."""

import dataclasses
import json
from pathlib import Path

import pytest

from accel_gpt2.catalog.gpus import GPUS
from accel_gpt2.catalog.models import MODELS
from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.plan.calibration import (
    FORMULA_VERSION,
    Calibration,
    CalibrationRecord,
    Residual,
    calibrated_memory,
    read_records,
)
from accel_gpt2.plan.data import dataset_statistics
from accel_gpt2.plan.memory import MemoryPlan, plan_memory
from accel_gpt2.plan.throughput import cold_tokens_per_second
from accel_gpt2.recipe import Layer, TrainRecipe
from accel_gpt2.recipe.resolving import resolve

from .records import record

# Tokens per second.
PREDICTED = {"cpu": 8321, "rtx4070ti": 40691, "a100-80": 106990}


def _residual(
    *records: CalibrationRecord, recipe: TrainRecipe | None = None, model: str = "gpt2"
) -> Residual | None:
    return Calibration(records=records).residual(
        "tokens_per_second",
        gpu=None,
        strategy="single",
        recipe=recipe or TrainRecipe(),
        model=MODELS[model],
    )


def _line(**changes: object) -> str:
    return json.dumps({**dataclasses.asdict(record()), **changes})


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    """What was written is read, in order."""
    path = tmp_path / "calibration.jsonl"
    records = (record(measured=900.0), record(model="gpt2-tiny", predicted_allocated_bytes=5))
    path.write_text("".join(json.dumps(dataclasses.asdict(x)) + "\n" for x in records))
    assert read_records(path).records == records


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "null",
        "[1]",
        "[" * 100_000,
        '{"date": 1}',
        _line(measured_tokens_per_second="fast"),
        _line(measured_tokens_per_second=float("nan")),
        _line(measured_tokens_per_second=float("inf")),
        _line(measured_tokens_per_second=-1.0),
        _line(n_layer=0),
        _line(n_layer=True),
        _line(n_layer=12.5),
        _line(device=None),
        _line(gradient_checkpointing=1),
        _line(formula_version=FORMULA_VERSION + 1),
        _line(more=1),
        "\x00\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    ],
)
def test_what_cannot_be_read_is_left_out(tmp_path: Path, line: str) -> None:
    """A damaged, foreign or outdated line costs itself, never the plan or the lines beside it."""
    path = tmp_path / "calibration.jsonl"
    path.write_text(f"{_line()}\n{line}\n{_line()}\n", encoding="utf-8")
    assert read_records(path).records == (record(), record())


def test_no_file_is_no_record(tmp_path: Path) -> None:
    """A missing file, and a folder in its place, hold nothing."""
    assert read_records(tmp_path / "none.jsonl") == Calibration()
    assert read_records(tmp_path) == Calibration()


def test_the_median_of_the_newest_counts() -> None:
    """One disturbed measurement moves nothing, and what was measured long ago ends to count."""
    usual = [record(measured=800.0 + i) for i in range(4)]
    found = _residual(*usual[:2], record(measured=100.0), *usual[2:])
    assert found is not None
    assert found.ratio == pytest.approx(0.801)
    assert found.low == pytest.approx(0.1)  # the range still says that it happened
    assert found.num_records == 5
    later = _residual(*[record(measured=10.0)] * 9, *[record(measured=800.0)] * 9)
    assert later is not None
    assert (later.ratio, later.low) == (0.8, pytest.approx(0.8 / 1.15))


def test_only_the_same_device_and_strategy_count() -> None:
    """A GPU's records say nothing of a CPU, and two processes' nothing of one."""
    assert _residual(record(device="rtx4070ti")) is None
    assert _residual(record(strategy="ddp")) is None
    unmeasured = dataclasses.replace(record(), measured_tokens_per_second=None)
    assert _residual(unmeasured) is None


def test_an_upgrade_begins_anew() -> None:
    """Records of an older driver or torch do not count once there is one of the newer."""
    old = [record(measured=500.0, torch="2.12.0")] * 5
    found = _residual(*old, record(measured=900.0))
    assert found is not None
    assert (found.ratio, found.num_records) == (0.9, 1)


def test_the_nearest_configuration_counts() -> None:
    """The same model's record is used before another's; without it the nearest, in a wider
    range; and what is too unlike says nothing."""
    tiny, small = record(model="gpt2-tiny", measured=300.0), record(measured=800.0)
    same, other = _residual(tiny, small), _residual(tiny)
    assert same is not None
    assert other is not None
    assert (same.ratio, other.ratio) == (0.8, 0.3)
    assert "this configuration" in same.source
    assert "others" in other.source
    assert other.high / other.ratio > same.high / same.ratio
    unlike = TrainRecipe(
        optimizer="adafactor",
        finetuning="lora",
        mixed_precision="bf16",
        gradient_checkpointing=True,
        micro_batch_tokens=1024,
    )
    assert _residual(tiny, recipe=unlike, model="gpt2-xl") is None


def test_reserved_memory_is_what_was_seen_and_never_less_than_allocated() -> None:
    """A measured allocator moves reserved and device memory alike; the terms stay the formula's."""
    recipe = TrainRecipe(mixed_precision="bf16")
    profile, model, strategy = PROFILES["rtx4070ti"], MODELS["gpt2"], STRATEGIES["single"]
    plan = plan_memory(recipe, model, profile, strategy, longest_tokens=1024)

    def calibrated(ratio: float) -> MemoryPlan:
        before = plan.reserved.expected
        measured = record(
            device="rtx4070ti",
            mixed_precision="bf16",
            predicted_reserved_bytes=before,
            measured_reserved_bytes=round(before * ratio),
        )
        return calibrated_memory(
            plan,
            Calibration(records=(measured,)),
            gpu=GPUS["rtx4070ti"],
            strategy="single",
            recipe=recipe,
            model=model,
        )

    more = calibrated(1.2)
    assert more.reserved.expected == pytest.approx(1.2 * plan.reserved.expected, rel=1e-6)
    assert more.device.expected - plan.device.expected == pytest.approx(
        more.reserved.expected - plan.reserved.expected
    )
    assert more.phases == plan.phases
    less = calibrated(0.2)
    assert less.reserved.expected == less.reserved.low == plan.allocated_bytes


def test_the_version_says_which_arithmetic_residuals_are_of() -> None:
    """Whoever changes what is predicted raises FORMULA_VERSION, because measurements made before
    were compared with other predictions; then the figures here follow."""
    predicted = {}
    for profile, values in (
        ("cpu", {"model": "gpt2-tiny"}),
        ("rtx4070ti", {"mixed_precision": "bf16"}),
        ("a100-80", {"mixed_precision": "bf16", "finetuning": "lora"}),
    ):
        recipe = resolve([Layer(origin="test", values=values)]).recipe
        row, model = PROFILES[profile], MODELS[recipe.model]
        data = dataset_statistics(recipe)
        assert data is not None
        strategy = STRATEGIES["single"]
        speed = cold_tokens_per_second(recipe, model, row, strategy, data)
        predicted[profile] = round(speed)
    assert (FORMULA_VERSION, predicted) == (3, PREDICTED)
