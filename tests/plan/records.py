"""Calibration records of trainings that never were."""

import dataclasses
from typing import Any

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.plan.calibration import CalibrationRecord

_GPT2 = MODELS["gpt2"]

_RECORD = CalibrationRecord(
    date="2026-11-23T12:00:00+0000",
    device="cpu",
    driver="1",
    torch="2.13.0",
    strategy="single",
    num_processes=1,
    model="gpt2",
    n_layer=_GPT2.n_layer,
    n_embd=_GPT2.n_embd,
    vocab_size=_GPT2.vocab_size,
    mixed_precision="no",
    finetuning="full",
    optimizer="adamw",
    gradient_checkpointing=False,
    micro_batch_tokens=4096,
    context_tokens=60.0,
    predicted_allocated_bytes=None,
    measured_allocated_bytes=None,
    predicted_reserved_bytes=None,
    measured_reserved_bytes=None,
    predicted_tokens_per_second=1000.0,
    measured_tokens_per_second=1000.0,
)


def record(
    *, model: str = "gpt2", predicted: float = 1000.0, measured: float = 1000.0, **values: Any
) -> CalibrationRecord:
    """A record of gpt2 on a CPU, with these fields in place of its own."""
    row = MODELS[model]
    shape = {"n_layer": row.n_layer, "n_embd": row.n_embd, "vocab_size": row.vocab_size}
    return dataclasses.replace(
        _RECORD,
        model=model,
        predicted_tokens_per_second=predicted,
        measured_tokens_per_second=measured,
        **{**shape, **values},
    )
