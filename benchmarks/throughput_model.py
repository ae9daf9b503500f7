"""How near is a plan's speed to a real training's, before `bench` and after it?

    python benchmarks/throughput_model.py [--rounds 3] [--threads 2]

Each round benches and then trains each model in turn, on docstrings, on the CPU. With one thread,
as without --threads, seconds are this process's CPU seconds in place of the wall's, because other
programs share the machine; plans and trainings are compared in the same ones. With more threads
they are the wall's, and want a quiet machine. Seven minutes for two rounds of one thread.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from results import Page, say

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.classify.fit import fit
from accel_gpt2.plan.calibration import CALIBRATION_FILE, Calibration, read_records
from accel_gpt2.plan.data import dataset_statistics
from accel_gpt2.plan.throughput import plan_time
from accel_gpt2.recipe import Layer, ResolvedRecipe, TrainRecipe
from accel_gpt2.recipe.resolving import resolve
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


def _one_round(
    recipe: TrainRecipe, folder: Path, *, num_threads: int
) -> tuple[float, float, float]:
    """Tokens per second: planned cold, planned after bench, measured by a real training."""
    model = MODELS[recipe.model]
    data = dataset_statistics(recipe)
    assert data is not None
    here = dataclasses.replace(PROFILES["cpu"], num_threads=num_threads)

    def planned(records: Calibration) -> float:
        found = plan_time(recipe, model, here, STRATEGIES["single"], data, calibration=records)
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


class _CpuClock:
    monotonic = staticmethod(time.process_time)


def main() -> None:
    """Write a page for docs/benchmarks/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.threads == 1:
        speed.time = loop.time = _CpuClock  # type: ignore[assignment]
    calibration.MIN_STEPS = 5
    page = Page(
        given.output,
        "throughput-model" if given.threads == 1 else f"throughput-model-{given.threads}-threads",
        "How near planned speeds are to trainings on this CPU",
        packages=("accel-gpt2", "torch", "transformers"),
    )
    found: dict[tuple[str, int, int, int], list[tuple[float, float, float]]] = {}
    for number in range(given.rounds):
        for configuration in CONFIGURATIONS:
            with tempfile.TemporaryDirectory() as folder:
                result = _one_round(
                    _recipe(*configuration), Path(folder), num_threads=given.threads
                )
            found.setdefault(configuration, []).append(result)
            cold, warm, measured = result
            say(
                f"round {number + 1} {configuration}: cold {cold:.0f} after bench {warm:.0f} "
                f"measured {measured:.0f}, load {os.getloadavg()[0]:.1f}"
            )
    page.add(
        f"Full fine-tuning in fp32 from random weights, {given.threads} thread(s); document tokens "
        f"a {'CPU ' if given.threads == 1 else ''}second, medians of {given.rounds} rounds. "
        '"Cold" is the formula alone, "after bench" with one measurement of up to 20 steps; in '
        "brackets the farthest round.\n\n"
        "| model | longest document | tokens a step | trained | cold | after bench |\n"
        "|---|---|---|---|---|---|"
    )
    farthest = [0.0, 0.0]
    for (model, longest, tokens, _), results in found.items():
        cells = []
        for column in range(2):
            errors = [result[column] / result[2] - 1 for result in results]
            worst = max(errors, key=abs)
            farthest[column] = max(farthest[column], abs(worst))
            cells.append(f"{statistics.median(errors):+.0%} ({worst:+.0%})")
        measured = statistics.median(result[2] for result in results)
        page.add(
            f"| {model} | {longest} | {tokens:,} | {measured:,.0f} | {cells[0]} | {cells[1]} |"
        )
    page.add("")
    page.bar("Farthest from a training, cold", farthest[0], 0.35, at_most=True)
    page.bar("Farthest from a training, after bench", farthest[1], 0.15, at_most=True)


if __name__ == "__main__":
    main()
