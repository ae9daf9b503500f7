"""The closed form of memory agrees with a trace of the step that is really run.

In all configurations of docs/benchmarks/2026-11-30-memory-closed-form.md: two to three minutes.
"""

import statistics
from collections.abc import Sequence

import pytest

from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.trace.memory import TraceRequest

from .memory_grid import compare, configurations, options, rows

COUNT, N_LAYER = 64, 3

# Of the peak. What is left are tensors of a few KiB, and formulas read off traces.
LARGEST, MOST_TOO_LOW, MEAN = 0.02, 0.01, 0.003


@pytest.mark.slow
def test_closed_form_and_trace_agree() -> None:
    """No peak is off by more than 2%, and 0.3% on average; the phases are the trace's own."""
    comparisons = compare(configurations(COUNT, n_layer=N_LAYER))
    assert len(comparisons) == COUNT
    errors = {}
    for comparison in comparisons:
        assert comparison.traced.phases.keys() <= set(comparison.planned_bytes)
        errors[str(comparison.request)] = comparison.relative_error
    worst = max(errors, key=lambda key: abs(errors[key]))
    assert abs(errors[worst]) <= LARGEST, f"{errors[worst]:+.2%} in {worst}"
    assert min(errors.values()) >= -MOST_TOO_LOW
    assert statistics.mean(map(abs, errors.values())) <= MEAN


@pytest.mark.slow
def test_options_that_save_memory_agree_too() -> None:
    """Selective checkpointing, released gradients, DoRA and paged states, by the same bars."""
    errors = _errors_within_the_largest(options(n_layer=N_LAYER))
    assert len(errors) == 15
    assert min(errors) >= -MOST_TOO_LOW
    assert statistics.mean(map(abs, errors)) <= MEAN


@pytest.mark.slow
def test_packed_rows_agree_up_to_the_padding_that_a_plan_allows_them() -> None:
    """Documents of one length have none, so a plan is too high, by what an eighth of it takes."""
    errors = _errors_within_the_largest(rows(n_layer=N_LAYER))
    assert len(errors) == 8
    assert min(errors) >= -0.001
    assert max(errors) > 0.002  # it is there


def _errors_within_the_largest(cases: Sequence[tuple[TrainRecipe, TraceRequest]]) -> list[float]:
    comparisons = compare(cases)
    worst = max(comparisons, key=lambda x: abs(x.relative_error))
    assert abs(worst.relative_error) <= LARGEST, f"{worst.relative_error:+.2%} in {worst.request}"
    return [x.relative_error for x in comparisons]
