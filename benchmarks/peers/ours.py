"""accel-gpt2: what `accel-gpt2 train` does, through the same `RunTraining`, directory and log."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from accel_gpt2.classify.part_training import DirectoryRecords, RunTraining, count_steps
from accel_gpt2.classify.parts import parts_of
from accel_gpt2.classify.standing import start_directory
from accel_gpt2.train.loop import ClassTraining
from accel_gpt2.train.objective import TrainedModel, TransformersModel, to_device
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.stopping import StopRequest
from peers.turns import Turns
from peers.workload import Documents, Workload, our_recipe, prepared


def train(work: Workload, documents: Documents, turns: Turns, variant: str) -> None:
    """Train one language model of all documents, with every setting at its default that the
    comparison does not fix."""
    recipe = our_recipe(work, global_batch_tokens=documents.budget_of_a_step(work)).recipe
    data = prepared(work)
    directory = work.folder / "run"
    accelerator = build_accelerator(recipe, directory)
    standings = start_directory(directory, recipe, data, resume="never")
    parts = parts_of(directory, recipe.objective, data.text.class_names)
    steps = count_steps(recipe, data, parts, standings)
    records = DirectoryRecords(
        directory, parts, standings, steps, recipe=recipe, spent=lambda: None
    )

    class Paused(RunTraining):
        """Waits for its turn when everything is built."""

        def begin(self, part: Any, model: TrainedModel) -> ClassTraining:
            job = super().begin(part, model)
            assert isinstance(model, TransformersModel)

            def batch_loss(batch: Any) -> float:
                labels = np.zeros(len(batch), np.int64)
                arrays = model.collate(batch, labels, epoch=0)
                return float(model(*to_device(arrays, accelerator.device)))

            tokens = _tokens_of_steps(job)
            turns.on_step = lambda: turns.count(next(tokens))
            turns.begin(model.transformers_model.get_input_embeddings(), batch_loss)
            return job

    with (
        TrainProgress(shown=True, quiet=True) as progress,
        StopRequest(handle_signals=False) as stop,
        records,
    ):
        Paused(
            recipe,
            directory,
            data,
            standings,
            accelerator,
            stop=stop,
            progress=progress,
            spent_seconds=0.0,
            records=records,
            steps=steps,
        ).train(parts[0])


def _tokens_of_steps(job: ClassTraining) -> Iterator[int]:
    """Document tokens of each optimizer step: the batches are decided before the first one."""
    for epoch in itertools.count():
        for batch in job.schedule.epoch(epoch):
            yield int((job.documents.lengths[batch] - 1).sum())
