"""What one part of a run needs, and what is done when it is trained.

Whoever trains the parts goes through this: one after another (`fit`), each in a process of its own
(`placed_child`), or all on one base (`shared_base`).
"""

import contextlib
import dataclasses
import gc
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from accel_gpt2.classify.card import write_card
from accel_gpt2.classify.describe import announce_plan, describe_plan
from accel_gpt2.classify.parts import Part, parts_of
from accel_gpt2.classify.prepare import PreparedData
from accel_gpt2.classify.run import (
    LOG,
    TRAINING_RECORD,
    read_training_record,
    score_log_prior,
    write_recipe,
)
from accel_gpt2.classify.spending import SECONDS_BETWEEN_WRITES
from accel_gpt2.classify.standing import Standing, part_identity
from accel_gpt2.classify.status import ClassStatus, RunStatus
from accel_gpt2.classify.validation import joint_accuracy
from accel_gpt2.durable import write_json
from accel_gpt2.errors import StoppedEarly, UserError
from accel_gpt2.failures import ending
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.checkpoint import TrainState, checkpoint_path, read_state, read_weights
from accel_gpt2.train.loop import ClassTraining, train_class
from accel_gpt2.train.manifest import publish_directory, verify
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import TrainedModel, TransformersModel
from accel_gpt2.train.processes import current_gpu, current_strategy, on_first_process
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.run_log import append_json_line, cut_unfinished_line
from accel_gpt2.train.schedule import BatchSchedule
from accel_gpt2.train.stopping import StopRequest


class RunRecords(Protocol):
    """Where a run keeps what it says while it trains; called on the first process alone."""

    def log(self, row: dict[str, Any]) -> None:
        """A row of log.jsonl."""

    def planned(self, recipe: TrainRecipe, plan: dict[str, Any]) -> None:
        """What is to be trained; again when the micro batch has become smaller."""

    def saved(self, part: Part) -> None:
        """A checkpoint of a part is in place."""

    def failed(self, part: Part, message: str) -> None:
        """A part has failed, and others go on."""


class DirectoryRecords:
    """`RunRecords` in the files of the run directory, by the process that holds it.

    As a context manager it notes how the parts ended that were being trained. `spent` writes down
    what the run has cost: with every checkpoint, and once a minute.
    """

    def __init__(
        self,
        run_directory: Path,
        parts: Sequence[Part],
        standings: Sequence[Standing],
        steps: Sequence[int],
        *,
        recipe: TrainRecipe,
        spent: Callable[[], None],
    ) -> None:
        self._run_directory = run_directory
        self._spent = spent
        self._spent_noted = time.monotonic()
        self._recipe = recipe
        self._plan: dict[str, Any] = {}
        rows = [
            _status(part, standing, total_steps)
            for part, standing, total_steps in zip(parts, standings, steps, strict=True)
        ]
        self.status = RunStatus(run_directory, rows)

    def __enter__(self) -> "DirectoryRecords":
        cut_unfinished_line(self._run_directory / LOG)
        self.status.write()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        stopped = isinstance(error, StoppedEarly | KeyboardInterrupt)
        for row in self.status.classes:
            if row.state == "training":
                message = "" if stopped or error is None else ending(error)[1]
                self.status.ended(row.index, "stopped" if stopped else "failed", message)
        if self._plan:  # the card has what it cost
            with contextlib.suppress(UserError, OSError):  # a full disk is told elsewhere
                self._note_spent()
                write_card(self._run_directory, self._recipe, self._plan, metrics=None)

    def log(self, row: dict[str, Any]) -> None:
        append_json_line(self._run_directory / LOG, row)
        self.note(row, process=os.getpid())

    def note(self, row: dict[str, Any], *, process: int) -> None:
        """Bring the other records up to a row of log.jsonl."""
        if time.monotonic() - self._spent_noted >= SECONDS_BETWEEN_WRITES:
            self._note_spent()
        if row["event"] == "finish":
            self.status.ended(row["class_index"], "finished")
        else:
            self.status.reached(row["class_index"], row["step"], process=process)

    def planned(self, recipe: TrainRecipe, plan: dict[str, Any]) -> None:
        if recipe != self._recipe:
            write_recipe(self._run_directory, recipe)
        self._recipe, self._plan = recipe, plan
        write_json(self._run_directory / "plan.json", plan)
        write_card(self._run_directory, recipe, plan, metrics=None)

    def saved(self, part: Part) -> None:
        self._note_spent()
        if (best := _best_loss_bits(part)) is not None:
            self.status.best(part.index, best)

    def failed(self, part: Part, message: str) -> None:
        self.status.ended(part.index, "failed", message)

    def _note_spent(self) -> None:
        self._spent()
        self._spent_noted = time.monotonic()


def _status(part: Part, standing: Standing, total_steps: int) -> ClassStatus:
    step = 0
    if standing.checkpoint is not None:
        step = read_state(standing.checkpoint)[0].step
    return ClassStatus(
        index=part.index,
        name=part.name,
        state="finished" if standing.finished else "waiting",
        step=total_steps if standing.finished else step,
        total_steps=total_steps,
        best_loss_bits=_best_loss_bits(part),
    )


def _best_loss_bits(part: Part) -> float | None:
    best = part.directory / "best"
    return read_state(best)[0].best_loss_bits if (best / "state.json").is_file() else None


class RunTraining:
    """The parts of a run, and what each of them needs in this process.

    All processes of a launch make one together, and call its methods together.

    Args:
        steps: of each part, where somebody has counted them.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        run_directory: Path,
        data: PreparedData,
        standings: Sequence[Standing],
        accelerator: Any,
        *,
        stop: StopRequest,
        progress: TrainProgress,
        spent_seconds: float,
        records: RunRecords,
        steps: Sequence[int],
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.parts = parts_of(run_directory, recipe.objective, data.text.class_names)
        self.accelerator = accelerator
        self.stop = stop
        self.progress = progress
        self._run_directory = run_directory
        self._standings = standings
        self._spent_seconds = spent_seconds
        self._records = records
        self._steps = steps
        self._gpu = current_gpu(accelerator)
        self.plan: dict[str, Any] = {}  # of plan.json; empty until a part begins

    def announce(self, part: Part) -> bool:
        """Say where a part stands; whether it has to be trained."""
        standing = self._standings[part.index]
        announce(self.progress, part, standing, num_parts=len(self.parts))
        return not standing.finished

    def build_model(self) -> TrainedModel:
        """A model as each part's training begins with."""
        data = self.data
        return build_model(
            self.recipe,
            vocab_size=data.tokenizer.vocab_size,
            eos_token_id=data.tokenizer.eos_token_id,
            mask_token_id=data.tokenizer.mask_token_id,
            pad_token_id=data.tokenizer.pad_token_id,
            class_names=data.text.class_names,
            log_prior=score_log_prior(self.recipe, data.class_counts),
            mean_tokens=float(data.train.lengths.mean()) - 1,
        )

    def begin(self, part: Part, model: TrainedModel) -> ClassTraining:
        """The training of a part, which is noted to have begun; the first one's with the plan."""
        standing = self._standings[part.index]
        if not self.plan:
            self.plan = describe_plan(
                self.recipe,
                self.data,
                model,
                self.parts,
                list(self._steps),
                self.accelerator.num_processes,
            )
            self._write_plan()
            announce_plan(self.progress, self.plan, self._run_directory, self.accelerator)
        own = part.own(self.data.train)
        later = sum(
            count
            for number, count in enumerate(self._steps)
            if number > part.index and not self._standings[number].finished
        )
        job = ClassTraining(
            identity=part_identity(self.recipe, self.data, part),
            directory=part.directory,
            documents=self.data.train.select(own),
            validation=self.data.validation,
            own_validation=part.own(self.data.validation),
            model=model,
            schedule=BatchSchedule(
                self.data.train.lengths[own], self.recipe, total_steps=self._steps[part.index]
            ),
            checkpoint=standing.checkpoint,
            joint_accuracy=joint_accuracy(part, self.parts, self.data, self.recipe),
            num_parts=len(self.parts),
            spent_seconds=self._spent_seconds,
            later_steps=lambda step: later,
            on_recipe=self._use_recipe,
            on_saved=partial(self._records.saved, part),
        )
        start = standing.checkpoint
        self.log(
            {
                "event": "start" if start is None else "resume",
                "class_index": part.index,
                "class_name": part.name,
                "step": 0 if start is None else read_state(start)[0].step,
                "world_size": self.accelerator.num_processes,
                "changed": {key: list(pair) for key, pair in standing.changed.items()},
            }
        )
        return job

    def train(self, part: Part) -> None:
        """Train one part to its end, and free what it had on the device."""
        model = self.build_model()
        job = self.begin(part, model)
        state = train_class(
            job,
            self.recipe,
            accelerator=self.accelerator,
            gpu=self._gpu,
            stop=self.stop,
            progress=self.progress,
            log=self.log,
        )
        self.finish(part, job, state)
        # In this order, or the next model is built while this one is still on the device:
        # Accelerate's wrapped forward pass makes the model a cycle that only gc takes apart.
        del model, job
        self.accelerator.free_memory()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def failed(self, part: Part, error: UserError) -> None:
        """Say that a part has failed, and that the others go on."""
        self._records.failed(part, str(error))
        self.progress.say(f"{part.name} failed: {error} The other classes go on.")

    def finish(self, part: Part, job: ClassTraining, state: TrainState) -> None:
        """Publish the best checkpoint of a trained part as what transformers or peft loads."""
        model = job.model
        strategy = current_strategy(self.accelerator)
        # DeepSpeed leaves weights in flat buffers of its own, and with bf16 rounded.
        reshaped = strategy.shards_parameters or strategy.backend == "deepspeed"
        if reshaped and self._is_first:
            model = self.build_model()  # a whole one, in host memory
        publish = partial(_publish_finals, self.data, job, model, part.finals, state)
        on_first_process(self.accelerator, publish)
        self.log(
            {
                "event": "finish",
                "class_index": part.index,
                "class_name": part.name,
                "step": state.step,
            }
        )

    def log(self, row: dict[str, Any]) -> None:
        """A row of log.jsonl, and its numbers for the trackers."""
        if not self._is_first:
            return
        self._records.log(row)
        slug = self.parts[row["class_index"]].directory.name
        numbers = {
            f"{slug}/{key}": value
            for key, value in row.items()
            if isinstance(value, int | float) and key not in {"class_index", "step", "best"}
        }
        self.accelerator.log(numbers, step=row["step"])

    @property
    def _is_first(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def _use_recipe(self, smaller: TrainRecipe) -> None:
        self.recipe = smaller
        self.plan["micro_batch_tokens"] = smaller.micro_batch_tokens
        self._write_plan()

    def _write_plan(self) -> None:
        on_first_process(self.accelerator, partial(self._records.planned, self.recipe, self.plan))


def announce(progress: TrainProgress, part: Part, standing: Standing, *, num_parts: int) -> None:
    """Say where a part stands that is finished or begun."""
    if standing.finished:
        progress.say(f"{part.name} ({part.index + 1}/{num_parts}) is trained already")
    for problem in standing.skipped:
        progress.say(f"Skipped: {problem}")
    if standing.checkpoint is not None:
        progress.say(f"{part.name} goes on from {standing.checkpoint}")


def count_steps(
    recipe: TrainRecipe, data: PreparedData, parts: Sequence[Part], standings: Sequence[Standing]
) -> list[int]:
    """Optimizer steps of each part, from 0 to its end."""
    return [
        BatchSchedule(
            data.train.lengths[part.own(data.train)],
            recipe,
            total_steps=_known_steps(part, standing),
        ).total_steps
        for part, standing in zip(parts, standings, strict=True)
    ]


def _known_steps(part: Part, standing: Standing) -> int | None:
    """The number of a part's steps, where a checkpoint or its final model tells it."""
    if standing.finished:
        return read_training_record(part.finals[0]).steps
    if standing.checkpoint is None:
        return None
    return read_state(standing.checkpoint)[0].total_steps


def _publish_finals(
    data: PreparedData,
    job: ClassTraining,
    model: TrainedModel,
    finals: Sequence[Path],
    state: TrainState,
) -> None:
    """Write each `final/` from the best checkpoint."""
    best = checkpoint_path(job.directory, state.best_step)
    verify(best)
    model.load_trainable_state(read_weights(best), best)
    record = {
        "class_index": job.identity.class_index,
        "class_name": job.identity.class_name,
        "best_step": state.best_step,
        "best_loss_bits": state.best_loss_bits,
        "steps": state.step,
        "document_tokens": state.tokens,
        "seconds": state.seconds,
        "peak_memory_bytes": state.peak_memory_bytes,
        "identity": dataclasses.asdict(job.identity),
    }

    def write(transformers_model: TransformersModel, staging: Path) -> None:
        transformers_model.save_pretrained(staging)
        data.tokenizer.save(staging)
        write_json(staging / TRAINING_RECORD, record)

    for final, transformers_model in zip(finals, model.finals, strict=True):
        publish_directory(final, partial(write, transformers_model))
