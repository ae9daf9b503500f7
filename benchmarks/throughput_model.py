"""How near is a plan's speed to a real training's, before `bench` and after it?

    python benchmarks/throughput_model.py [rounds]

Each round benches and then trains each model in turn, on docstrings, on the CPU. Seconds are this
process's CPU seconds in place of the wall's, because other programs share the machine; plans and
trainings are compared in the same ones.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a CPU second is a second of one core then

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.classify.fit import fit
from accel_gpt2.plan.calibration import CALIBRATION_FILE, Calibration, read_records
from accel_gpt2.plan.data import dataset_statistics
from accel_gpt2.plan.throughput import plan_time
from accel_gpt2.recipe import Layer, ResolvedRecipe, TrainRecipe, resolve
from accel_gpt2.trace import speed
from accel_gpt2.train import calibration, loop

# Model, longest document, tokens of a step, steps.
CONFIGURATIONS = (
    ("gpt2-tiny", 128, 512, 30),
    ("gpt2-tiny", 64, 2048, 15),
    ("gpt2-mini", 128, 512, 15),
    ("distilgpt2", 64, 128, 9),
    ("gpt2", 64, 128, 9),
)


def _recipe(model: str, max_length: int, tokens: int, steps: int) -> TrainRecipe:
    values = {
        "model": model,
        "init": "scratch",
        "dataset": "docstrings",
        "objective": "unconditional",
        "max_length": max_length,
        "global_batch_tokens": tokens,
        "max_steps": steps,
        "train_documents_per_class": 400,
        "validation_documents": 8,
        "trackers": (),
    }
    return resolve([Layer(origin="benchmark", values=values)]).recipe


def _one_round(recipe: TrainRecipe, folder: Path) -> tuple[float, float, float]:
    """Tokens per CPU second: planned cold, planned after bench, measured by a real training."""
    model = MODELS[recipe.model]
    data = dataset_statistics(recipe)
    assert data is not None

    def planned(records: Calibration) -> float:
        found = plan_time(
            recipe, model, PROFILES["cpu"], STRATEGIES["single"], data, calibration=records
        )
        assert found is not None
        return found.tokens_per_second

    benched = speed.measure_speed(
        recipe,
        model,
        data,
        steps=recipe.max_steps or 20,
        max_seconds=30.0,
        on_step=lambda number, total: None,
    )
    os.environ["ACCEL_GPT2_CACHE"] = str(folder)
    fit(ResolvedRecipe(recipe=recipe, origins={}), folder / "run", silent=True)
    (trained,) = read_records(folder / CALIBRATION_FILE).records
    assert trained.measured_tokens_per_second is not None
    return (
        planned(Calibration()),
        planned(Calibration(records=(benched.record,))),
        trained.measured_tokens_per_second,
    )


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3

    class _CpuClock:
        monotonic = staticmethod(time.process_time)

    speed.time = loop.time = _CpuClock  # type: ignore[assignment]
    calibration.MIN_STEPS = 5
    found: dict[tuple[str, int, int, int], list[tuple[float, float, float]]] = {}
    for number in range(rounds):
        for configuration in CONFIGURATIONS:
            with tempfile.TemporaryDirectory() as folder:
                result = _one_round(_recipe(*configuration), Path(folder))
            found.setdefault(configuration, []).append(result)
            cold, warm, measured = result
            sys.stdout.write(
                f"round {number + 1} {configuration}: cold {cold:.0f} after bench {warm:.0f} "
                f"measured {measured:.0f}, load {os.getloadavg()[0]:.1f}\n"
            )
            sys.stdout.flush()
    for configuration, results in found.items():
        errors = [[planned / x[2] - 1 for planned in x[:2]] for x in results]
        cold, warm = (statistics.median(column) for column in zip(*errors, strict=True))
        measured = statistics.median(x[2] for x in results)
        sys.stdout.write(
            f"| {' | '.join(map(str, configuration))} | {measured:.0f} | {cold:+.0%} | {warm:+.0%} "
            f"| {' '.join(f'{x[1]:+.0%}' for x in errors)} |\n"
        )
