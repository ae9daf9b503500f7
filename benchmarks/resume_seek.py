"""How long a run that goes on from a late step takes to its first batch.

    python benchmarks/resume_seek.py [documents] [step]

A real run on `documents` generated texts of one class (and a few of another) is stopped after its
first step; its checkpoint is then written again as that of step `step`, which the same schedule
gives, and the run is started again. Timed are the parts of that start up to the first micro batch.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from accel_gpt2.classify import fit as fitting
from accel_gpt2.errors import StoppedEarly
from accel_gpt2.recipe import Layer
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train import prefetch
from accel_gpt2.train.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from accel_gpt2.train.schedule import BatchSchedule

_WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("ala", "ine", "oru", "ut")]


def _write_texts(path: Path, num_documents: int) -> None:
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for number in range(num_documents + 200):
            words = " ".join(generator.choices(_WORDS, k=generator.randint(3, 12)))
            file.write(f"{words} {number},{'few' if number < 200 else 'many'}\n")


def _start(resolved: Any, run: Path) -> dict[str, float]:
    """Start the run, stop it after the large class's first step, and say when what happened."""
    times: dict[str, float] = {}
    real_split, real_prepare = prefetch.split_micro_batches, fitting.prepare_data
    real_epoch = BatchSchedule.epoch
    times["order"] = 0.0

    def prepared(*arguments: Any, **options: Any) -> Any:
        data = real_prepare(*arguments, **options)
        times["data"] = time.perf_counter()
        return data

    def epoch(self: BatchSchedule, number: int) -> Any:
        started = time.perf_counter()
        batches = real_epoch(self, number)
        times["order"] += time.perf_counter() - started
        return batches

    def split(*arguments: Any, **options: Any) -> Any:
        if "batch" not in times and len(arguments[0]) > 200:  # the small class trains to its end
            times["batch"] = time.perf_counter()
            os.kill(os.getpid(), signal.SIGTERM)
        return real_split(*arguments, **options)

    prefetch.split_micro_batches, fitting.prepare_data = split, prepared
    BatchSchedule.epoch = epoch  # type: ignore[method-assign]
    times["start"] = time.perf_counter()
    try:
        fitting.fit(resolved, run, quiet=True)
    except StoppedEarly:
        pass
    finally:
        prefetch.split_micro_batches, fitting.prepare_data = real_split, real_prepare
        BatchSchedule.epoch = real_epoch  # type: ignore[method-assign]
    return times


def _claim_step(resolved: Any, run: Path, step: int) -> int:
    """Rewrite the newest checkpoint of the large class as that of a later step."""
    (directory,) = run.glob("class-1-many")
    checkpoint = read_checkpoint(list_checkpoints(directory)[0])
    data = fitting.prepare_data(resolved.recipe, progress=False)
    lengths = data.train.lengths[data.train.for_class(1)]
    schedule = BatchSchedule(lengths, resolved.recipe, total_steps=checkpoint.state.total_steps)
    epoch, batch = 0, step
    while batch >= len(schedule.epoch(epoch)):
        batch -= len(schedule.epoch(epoch))
        epoch += 1
    state = checkpoint.state
    state.step, state.epoch, state.batch, state.evaluated_step = step, epoch, batch, step
    save_checkpoint(
        directory,
        state=state,
        identity=checkpoint.identity,
        weights=checkpoint.weights,
        optimizer=checkpoint.optimizer,
        random_states=checkpoint.random_states,
    )
    return epoch


def main(num_documents: int, step: int) -> None:
    """Print the seconds of each part of a start at `step`."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ACCEL_GPT2_CACHE"] = f"{folder}/cache"
        texts, run = Path(folder) / "texts.csv", Path(folder) / "run"
        _write_texts(texts, num_documents)
        values = {
            "model": "gpt2-tiny",
            "dataset": str(texts),
            "global_batch_tokens": 256,
            "max_length": 64,
            "trackers": [],
            "train_split": "train",
        }
        resolved = resolve([Layer(origin="benchmark", values=values)])
        _start(resolved, run)
        epoch = _claim_step(resolved, run, step)
        times = _start(resolved, run)
        sys.stdout.write(
            f"{num_documents} documents, step {step} (epoch {epoch}): first batch "
            f"{times['batch'] - times['data']:.2f} s after the data were there, "
            f"{times['order']:.2f} s of it for their order; reading and checking them took "
            f"{times['data'] - times['start']:.2f} s\n"
        )


if __name__ == "__main__":
    main(*(int(argument) for argument in [*sys.argv[1:], "1000000", "50000"][:2]))
