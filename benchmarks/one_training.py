"""Our training loop on documents in memory, step by step: no run directory, data set or plan."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from accel_gpt2.catalog.gpus import GpuSpec
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.checkpoint import Identity
from accel_gpt2.train.loop import ClassTraining, train_steps
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.schedule import BatchSchedule
from accel_gpt2.train.stopping import StopRequest


@contextmanager
def optimizer_steps(
    model: LanguageModel,
    documents: TokenizedDocuments,
    recipe: TrainRecipe,
    *,
    schedule: BatchSchedule,
    gpu: GpuSpec | None = None,
) -> Iterator[Iterator[int]]:
    """Give the loop's optimizer steps, each trained when the next one is asked for, as its targets.

    Args:
        schedule: the learning rates and the batches, of more steps than are taken.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = ClassTraining(
            identity=Identity(
                class_index=0, class_name="all", data_fingerprint="", tokenizer_fingerprint=""
            ),
            directory=Path(folder),
            documents=documents,
            validation=documents.select(np.arange(2)),
            own_validation=np.arange(2),
            model=model,
            schedule=schedule,
            checkpoint=None,
            joint_accuracy=lambda step, scores: None,
            num_parts=1,
            spent_seconds=0.0,
            later_steps=lambda step: 0,
            on_recipe=lambda recipe: None,
            on_saved=lambda: None,
        )
        micro_batches = train_steps(
            job,
            recipe,
            accelerator=build_accelerator(recipe),
            gpu=gpu,
            stop=StopRequest(handle_signals=False),
            progress=TrainProgress(shown=False, quiet=True),
            log=lambda row: None,
        )
        try:
            yield _steps(micro_batches)
        finally:
            micro_batches.close()


def _steps(micro_batches: Any) -> Iterator[int]:
    micro_batch = next(micro_batches)
    num_targets = 0
    while True:
        num_targets += len(micro_batch.tensors[1])
        last = micro_batch.last
        micro_batch = micro_batches.send(micro_batch.run())
        if last:
            yield num_targets
            num_targets = 0
