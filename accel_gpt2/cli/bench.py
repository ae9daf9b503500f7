"""`bench`: a minute of the recipe's own steps here, so that plans need not guess."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.cli.hardware import (
    DetectedHardware,
    choose_profile,
    describe_profile,
    detect_hardware,
    profile_here,
)
from accel_gpt2.cli.options import JsonOption, TrainOptions, given_layers
from accel_gpt2.cli.output import print_json, print_line, say
from accel_gpt2.errors import DoesNotFitError, UsageError
from accel_gpt2.recipe import Layer
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from accel_gpt2.plan.search import RunPlan
    from accel_gpt2.plan.throughput import TimePlan

_MAX_SECONDS = 60.0


def bench(
    options: TrainOptions,
    steps: Annotated[
        int, typer.Option(min=5, help="Steps to time; fewer where a minute is too short.")
    ] = 20,
    json: JsonOption = False,
) -> None:
    """Time the recipe's own steps on this machine, for a minute.

    Neither data nor weights are needed. What is measured is kept, and `plan` uses it from then on
    and need not guess.
    """
    from accel_gpt2.plan.memory import covers

    layers = given_layers(options)
    hardware = detect_hardware()
    profile = _profile_here(resolve(layers).recipe.profile, hardware)
    before = _plan(layers, profile)
    option, data = before.recommended, before.data
    assert option is not None
    assert data is not None
    if not covers(option.recipe, before.model):
        raise UsageError(
            f"bench measures GPT-2 language models, and this is {option.recipe.model} with the "
            f"objective {option.recipe.objective!r}; leave --set objective=... out, or let `train` "
            "measure it."
        )
    say(
        f"{option.recipe.model}, {option.label}, on {_machine(profile, hardware)}: up to {steps} "
        f"steps or {format_seconds(_MAX_SECONDS)}"
    )
    if profile.gpu is None:
        # As many threads as `train` gives its process; read when torch is loaded.
        os.environ.setdefault("OMP_NUM_THREADS", str(hardware.num_cores))
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from accel_gpt2.trace.speed import measure_speed
    from accel_gpt2.train.calibration import append_record
    from accel_gpt2.train.progress import TrainProgress

    with TrainProgress(shown=True, quiet=options.quiet) as progress:
        progress.start("bench", steps)
        measured = measure_speed(
            option.recipe,
            before.model,
            data,
            steps=steps,
            max_seconds=_MAX_SECONDS,
            on_step=lambda number, total: progress.update("bench", number, total, ""),
        )
    path = append_record(measured.record)
    after = _plan(layers, profile)
    assert after.recommended is not None
    assert option.time is not None
    assert after.recommended.time is not None
    record = measured.record
    if json:
        print_json(
            {
                "device": record.device,
                "driver": record.driver,
                "torch": record.torch,
                "recipe": {
                    "model": record.model,
                    "mixed_precision": record.mixed_precision,
                    "finetuning": record.finetuning,
                    "optimizer": record.optimizer,
                    "gradient_checkpointing": record.gradient_checkpointing,
                    "micro_batch_tokens": record.micro_batch_tokens,
                    "global_batch_tokens": measured.recipe.global_batch_tokens,
                },
                "steps": measured.num_steps,
                "tokens_per_second": {
                    "predicted": record.predicted_tokens_per_second,
                    "measured": record.measured_tokens_per_second,
                },
                "allocated_bytes": {
                    "predicted": record.predicted_allocated_bytes,
                    "measured": record.measured_allocated_bytes,
                },
                "reserved_bytes": {
                    "predicted": record.predicted_reserved_bytes,
                    "measured": record.measured_reserved_bytes,
                },
                "peak_memory_bytes": measured.peak_memory_bytes,
                "time_seconds": {
                    "before": _seconds(option.time),
                    "after": _seconds(after.recommended.time),
                },
                "recorded_in": str(path),
            }
        )
        return
    rows = [
        (
            "tokens/s",
            _count(record.predicted_tokens_per_second),
            _count(record.measured_tokens_per_second),
        )
    ]
    if record.measured_allocated_bytes is None:  # a CPU's allocator does not tell
        # The libraries, and the tensors of the batch that was run.
        besides = option.memory.device.expected - option.memory.reserved.expected
        expected = besides + (record.predicted_reserved_bytes or 0)
        rows.append(("resident", format_bytes(expected), format_bytes(measured.peak_memory_bytes)))
    else:
        rows += [
            (
                "allocated",
                _bytes(record.predicted_allocated_bytes),
                _bytes(record.measured_allocated_bytes),
            ),
            (
                "reserved",
                _bytes(record.predicted_reserved_bytes),
                _bytes(record.measured_reserved_bytes),
            ),
        ]
    for name, predicted, found in rows:
        print_line(f"{name:<10} predicted {predicted:>10}   measured {found:>10}")
    print_line(f"the run    {_range(option.time)} before, {_range(after.recommended.time)} now")
    say(f"Recorded in {path}; `accel-gpt2 plan` uses it from here on.")


def _profile_here(asked: str, hardware: DetectedHardware) -> HardwareProfile:
    profile = choose_profile(asked, hardware)
    if profile.gpu is None and asked not in {"auto", "cpu"}:
        raise UsageError(
            f"bench measures the machine that it runs on, and no GPU was found here for profile "
            f"{asked}; leave --profile out to measure the CPU."
        )
    return profile_here(profile, hardware)


def _plan(layers: list[Layer], profile: HardwareProfile) -> "RunPlan":
    from accel_gpt2.cli.planning import does_not_fit, plan_here

    made = plan_here(layers, profile, depth="none")
    asked = resolve(layers).recipe
    if made is None:
        raise UsageError(
            f"The shape of {asked.model!r} is not known here: give a catalog name, or a folder "
            "with the config.json of a GPT-2."
        )
    if made.recommended is None:
        raise DoesNotFitError(does_not_fit(made))
    if made.data is None:
        raise UsageError(
            f"How long the documents of {asked.dataset} are is not known; give --dataset imdb or "
            "--dataset ag_news, whichever is more alike."
        )
    return made


def _machine(profile: HardwareProfile, hardware: DetectedHardware) -> str:
    if profile.gpu is None:
        return f"the CPU ({hardware.num_cores} cores)"
    return describe_profile(profile)


def _seconds(time: "TimePlan") -> dict[str, float]:
    return {"low": time.total.low, "expected": time.total.expected, "high": time.total.high}


def _range(time: "TimePlan") -> str:
    low, high = format_seconds(time.total.low), format_seconds(time.total.high)
    return f"{format_seconds(time.total.expected)} ({low} to {high})"


def _count(value: float | None) -> str:
    return "unknown" if value is None else format_count(value)


def _bytes(value: int | None) -> str:
    return "unknown" if value is None else format_bytes(value)
