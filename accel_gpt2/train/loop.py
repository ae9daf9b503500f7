"""The training loop of one model: long and flat, so that a whole step can be read at once."""

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accel_gpt2.catalog.gpus import GpuSpec
from accel_gpt2.data.batching import Indices
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.errors import UserError
from accel_gpt2.plan.compiling import plan_compiling
from accel_gpt2.plan.flops import peak_flops_per_second
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.backend import Backend, MicroBatch, build_backend
from accel_gpt2.train.calibration import TrainedHere, record_training
from accel_gpt2.train.casts import casts_kept
from accel_gpt2.train.checkpoint import (
    Identity,
    TrainState,
    checkpoint_path,
    point_best_at,
    read_checkpoint,
    rotate,
    save_checkpoint,
    write_array,
)
from accel_gpt2.train.compiling import as_written, compile_blocks, compiled_seconds, is_compiled
from accel_gpt2.train.manifest import is_whole
from accel_gpt2.train.memory import fitting_micro_batch_tokens
from accel_gpt2.train.nonfinite import (
    MAX_SKIPPED_IN_A_ROW,
    NONFINITE_FILE,
    MicroBatchLoss,
    check_loss_scale,
    describe_losses,
    diverged,
    left_to_the_scaler,
    write_nonfinite_step,
)
from accel_gpt2.train.objective import TrainedModel
from accel_gpt2.train.optim import learning_rate_at, optimizer_state_bytes
from accel_gpt2.train.prefetch import Awaited, ahead, micro_batches_from
from accel_gpt2.train.processes import current_strategy, gather_objects, on_first_process
from accel_gpt2.train.progress import TrainProgress, describe_step
from accel_gpt2.train.schedule import BatchSchedule
from accel_gpt2.train.scoring import score_documents
from accel_gpt2.train.stopping import StopRequest
from accel_gpt2.train.tf32 import products_in_tf32
from accel_gpt2.train.throughput import StepTimer, flops_per_token, peak_memory_bytes

# What a row of log.jsonl goes through: the file, the trackers.
LogRow = Callable[[dict[str, object]], None]

VALIDATION_SCORES = "validation_scores"  # a folder in each class's directory


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassTraining:
    """One model to train: its documents, its place, and what it may continue from.

    `checkpoint` is a directory that `verify` has passed; None starts from step 0. `validation`
    holds the validation documents of all classes, since the classifier compares models on every
    document, and `own_validation` the indices of those of the model's own class or classes;
    `joint_accuracy` gives the accuracy of the whole classifier from this class's step and
    validation scores, or None while other classes have none. `spent_seconds` went into earlier
    starts of the run; `later_steps` gives how many steps are still to come in other classes when
    this one is at a step. `on_recipe` is told, on all ranks, when the recipe's micro batch was too
    large for this machine; `on_saved`, on the first rank, whenever a checkpoint is in place.
    """

    identity: Identity
    directory: Path
    documents: TokenizedDocuments
    validation: TokenizedDocuments
    own_validation: Indices
    model: TrainedModel
    schedule: BatchSchedule
    checkpoint: Path | None
    joint_accuracy: Callable[[int, NDArray[np.float64]], float | None]
    num_parts: int
    spent_seconds: float
    later_steps: Callable[[int], int]
    on_recipe: Callable[[TrainRecipe], None]
    on_saved: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _QueuedStep:
    """A step that the device has been given, and whose outcome is not known yet."""

    number: int
    where: dict[str, object]
    tokens: int
    targets: int
    micro_batches: Sequence[MicroBatchLoss]
    grad_norm: Awaited


# A step's outcome is read when the next one has been given to the device, which never waits so.
_STEPS_QUEUED = 1


def validation_scores_path(class_directory: Path, step: int) -> Path:
    """Where the scores of all validation documents are kept, float64, one file per evaluation."""
    return class_directory / VALIDATION_SCORES / f"{step}.npy"


def train_class(
    job: ClassTraining,
    recipe: TrainRecipe,
    *,
    accelerator: Any,
    gpu: GpuSpec | None,
    stop: StopRequest,
    progress: TrainProgress,
    log: LogRow,
) -> TrainState:
    """Train one model to the end of its schedule and return the final state: see `train_steps`."""
    steps = train_steps(
        job, recipe, accelerator=accelerator, gpu=gpu, stop=stop, progress=progress, log=log
    )
    try:
        micro_batch = next(steps)
        while True:
            micro_batch = steps.send(micro_batch.run())
    except StopIteration as finished:
        state: TrainState = finished.value
        return state


def train_steps(
    job: ClassTraining,
    recipe: TrainRecipe,
    *,
    accelerator: Any,
    gpu: GpuSpec | None,
    stop: StopRequest,
    progress: TrainProgress,
    log: LogRow,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[MicroBatch, Tensor, TrainState]:
    """The training of one model, which leaves forward and backward passes to who drives it.

    It yields one micro batch after another, is sent the summed loss of each once its gradients are
    there, and returns the final state. So the models of several classes can train in turn, or
    together.

    The loss of a step is the sum over its targets (of a language model the predicted tokens) over
    their number in the global batch, over all ranks and micro batches; so neither the number of
    these nor their size changes the result beyond rounding.

    Args:
        clock: seconds that go into this training, where it is not the only one.

    Raises:
        StoppedEarly: by a signal, the time limit or the budget, after saving.
        DoesNotFitError: when not even one document goes through the machine at once.
        UserError: when gradients are zero at the first step, numbers go wrong beyond the rule of
            `nonfinite`, or the disk is full.
    """
    device: torch.device = accelerator.device
    world_size: int = accelerator.num_processes
    rank: int = accelerator.process_index
    lengths = job.documents.lengths
    schedule = job.schedule
    flops = flops_per_token(job.model, lengths, recipe)
    peak_flops = peak_flops_per_second(gpu, recipe.mixed_precision, tf32=recipe.tf32)
    name = f"{job.identity.class_name} ({job.identity.class_index + 1}/{job.num_parts})"

    checkpoint = None if job.checkpoint is None else read_checkpoint(job.checkpoint)
    if checkpoint is not None and job.checkpoint is not None:
        job.model.load_trainable_state(checkpoint.weights, job.checkpoint)
    plain_model = job.model
    plain_model.pack_rows(recipe, device)
    backend = build_backend(accelerator, plain_model, recipe)
    # Dropout must differ between ranks; nothing else in the loop draws random numbers.
    torch.manual_seed(recipe.seed + 1_000_003 * (rank + 1))
    state = TrainState(total_steps=schedule.total_steps)
    saved: tuple[int, int] | None = None  # (step, evaluated_step) of what is on the disk
    if checkpoint is not None:
        state = checkpoint.state
        _load_optimizer(backend, checkpoint.optimizer)
        _set_random_state(checkpoint.random_states, rank)
        if job.checkpoint == checkpoint_path(job.directory, state.step):
            saved = (state.step, state.evaluated_step)
        best_path = checkpoint_path(job.directory, state.best_step)
        if state.best_step >= 0 and not on_first_process(accelerator, lambda: is_whole(best_path)):
            # What comes is compared with what there is: this step again, if it is one to evaluate.
            state.best_step, state.best_loss_bits = -1, math.inf
            state.evaluated_step, saved = -1, None
    resumed = checkpoint is not None
    del checkpoint  # 12 bytes a parameter

    def on_halved(micro_batch_tokens: int) -> None:
        nonlocal recipe
        recipe = dataclasses.replace(recipe, micro_batch_tokens=micro_batch_tokens)
        job.on_recipe(recipe)
        log(
            {
                "event": "micro_batch_halved",
                **_where(job.identity, state, schedule),
                "micro_batch_tokens": micro_batch_tokens,
            }
        )
        progress.say(
            f"{name}: out of memory; {micro_batch_tokens} tokens go through at once from here on, "
            "and twice as many micro batches make the same global batch"
        )

    train_seconds = 0.0
    if flops is not None and peak_flops is not None and gpu is not None:
        steps_left = schedule.total_steps - state.step + job.later_steps(state.step)
        step_tokens = float((lengths - 1).sum()) / len(schedule.epoch(0))
        rate = peak_flops * gpu.training_efficiency * world_size
        train_seconds = steps_left * step_tokens * flops / rate
    compiling = plan_compiling(train_seconds, gpu)
    in_groups = plain_model.packed and not plain_model.flash_packed
    strategy = current_strategy(accelerator)
    compiled = is_compiled(recipe, strategy, device, compiling, in_groups=in_groups)
    if compiled:
        num_blocks = compile_blocks(plain_model)
        progress.say(f"{name}: torch.compile of {num_blocks} blocks; {compiling.why}")

    backend.model.train()
    stepped_here = [x for x in backend.parameters if x.device.type == device.type]  # not offloaded
    if state.step < schedule.total_steps:
        fitting_micro_batch_tokens(
            backend,
            job.documents,
            micro_batch_tokens=recipe.micro_batch_tokens,
            reserved_bytes=0 if resumed else optimizer_state_bytes(stepped_here, recipe),
            accelerator=accelerator,
            on_halved=on_halved,
        )

    running_loss = torch.zeros((), dtype=torch.float64, device=device)
    running_targets = 0
    queued: deque[_QueuedStep] = deque()
    grad_norm = math.nan
    step_seconds = save_seconds = 0.0  # the longest so far
    timer = StepTimer()
    started = clock()
    seconds_before = state.seconds
    line_started, line_tokens = started, 0

    def settle(*, keep: int = 0) -> None:
        """Wait for the queued steps, but for the last `keep`, and book what came of them."""
        nonlocal grad_norm, running_targets
        while len(queued) > keep:
            done = queued.popleft()
            grad_norm = done.grad_norm.read()
            if done.number == 1 and grad_norm == 0.0:
                raise UserError(
                    f"{name}: every gradient of the first step is zero, so nothing would be "
                    "learnt; check the fine-tuning options (lora_target_modules, "
                    "gradient_checkpointing)."
                )
            if not math.isfinite(grad_norm):
                note_skipped(done, grad_norm)
                continue
            for item in done.micro_batches:
                running_loss.add_(item.loss)
            running_targets += done.targets
            state.tokens += done.tokens
            state.bad_steps_in_a_row = 0

    def gather_loss() -> None:
        """Move the loss summed on the devices into the state; it waits for all work on a GPU."""
        nonlocal running_targets
        settle()
        if world_size > 1:
            torch.distributed.all_reduce(running_loss)
        state.loss_sum += float(running_loss)
        state.loss_targets += running_targets
        running_loss.zero_()
        running_targets = 0
        state.seconds = seconds_before + clock() - started
        state.peak_memory_bytes = max(state.peak_memory_bytes, peak_memory_bytes(device))

    def save() -> None:
        nonlocal saved, save_seconds
        if saved == (state.step, state.evaluated_step):
            return
        save_started = clock()
        gather_loss()
        random_states = gather_objects(accelerator, _random_state(device))
        weights = backend.gathered_weights()
        optimizer = {
            "optimizer": backend.gathered_optimizer_state(),
            "scaler": None if backend.scaler is None else backend.scaler.state_dict(),
        }

        def write() -> None:
            save_checkpoint(
                job.directory,
                state=state,
                identity=job.identity,
                weights=weights,
                optimizer=optimizer,
                random_states=random_states,
            )
            if state.best_step >= 0:
                point_best_at(checkpoint_path(job.directory, state.best_step))
            rotate(job.directory, keep=recipe.keep_checkpoints, best_step=state.best_step)
            job.on_saved()

        on_first_process(accelerator, write)
        saved = (state.step, state.evaluated_step)
        stop.saved = True
        save_seconds = max(save_seconds, clock() - save_started)

    def evaluate() -> None:
        """Score the validation documents, note whether this is the best model so far, and save."""
        total = len(job.validation)
        done = 0
        progress.start(f"{name} validation", total)

        def on_batch(num_documents: int) -> None:
            nonlocal done
            done += num_documents
            progress.update(f"{name} validation", done, total, "")
            if stop.requested(device):
                save()  # not evaluated yet: a later start begins with this evaluation
                raise stop.error()

        with backend.scoring(), as_written() if compiled else contextlib.nullcontext():
            scores = score_documents(
                plain_model,
                job.validation,
                micro_batch_tokens=recipe.micro_batch_tokens,
                accelerator=accelerator,
                on_batch=on_batch,
            )
            validation = plain_model.validation(scores, job.validation, job.own_validation)
        if not math.isfinite(validation.loss_bits):
            finite = np.isfinite(scores.reshape(len(scores), -1).sum(axis=1))
            broken = [i for i in job.own_validation if not finite[i]]
            bad = [int(row) for row in job.validation.rows[broken]]
            raise UserError(
                f"{name}: the model gives {len(bad)} validation documents no finite likelihood "
                f"after step {state.step} (the first is row {bad[0]} of the training split), and "
                "nothing was saved from that; start again with a smaller --learning-rate to go on "
                "from the last whole checkpoint."
            )
        accuracy = job.joint_accuracy(state.step, scores)
        state.evaluated_step = state.step
        best = validation.loss_bits < state.best_loss_bits
        if best:
            state.best_step, state.best_loss_bits = state.step, validation.loss_bits
        scores_path = validation_scores_path(job.directory, state.step)
        on_first_process(accelerator, lambda: write_array(scores_path, scores))
        log(
            {
                "event": "evaluate",
                **_where(job.identity, state, schedule),
                **validation.values,
                "best": best,
                "joint_validation_accuracy": accuracy,
            }
        )
        save()
        joint = "" if accuracy is None else f" · joint validation accuracy {accuracy:.4f}"
        progress.say(
            f"{name} step {state.step}/{schedule.total_steps} · validation "
            f"{validation.loss_bits:.4f} {plain_model.loss_unit}{' (best)' if best else ''}{joint}"
        )
        progress.start(name, schedule.total_steps, state.step)

    def evaluation_due() -> bool:
        if state.evaluated_step == state.step:
            return False
        every = recipe.evaluate_every_steps
        at_interval = state.batch == 0 if every is None else state.step % every == 0
        return state.step == schedule.total_steps or (state.step > 0 and at_interval)

    def note_skipped(step: _QueuedStep, grad_norm: float) -> None:
        """The gradients were not finite, on all ranks alike: see `nonfinite` for the rule."""
        state.skipped_steps += 1
        losses = describe_losses(step.micro_batches, accelerator)
        if left_to_the_scaler(losses, backend.scaler):
            check_loss_scale(
                backend.scaler, name=name, step=step.number, skipped=state.skipped_steps
            )
            return
        state.bad_steps_in_a_row += 1
        where = {**step.where, "event": "skip"}
        rows = job.documents.rows
        on_first_process(
            accelerator,
            lambda: write_nonfinite_step(
                job.directory, where=where, losses=losses, grad_norm=grad_norm, rows=rows
            ),
        )
        if state.bad_steps_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise diverged(name, job.directory, step.number)
        log(where)
        progress.say(
            f"{name}: step {step.number} is skipped, its loss or gradients are not finite; its "
            f"documents are in {job.directory / NONFINITE_FILE}"
        )

    micro_batches = ahead(
        micro_batches_from(
            state.epoch,
            state.batch,
            num_steps=schedule.total_steps - state.step,
            schedule=schedule,
            documents=job.documents,
            model=plain_model,
            recipe=recipe,
            rank=rank,
            world_size=world_size,
            device=device,
        )
    )
    progress.start(name, schedule.total_steps, state.step)
    while True:
        if evaluation_due():
            settle()
            evaluate()
            line_started, line_tokens = clock(), 0
        if state.step == schedule.total_steps:
            break
        if stop.requested(device):
            if state.step > 0:
                save()
            raise stop.error()

        step_started = clock()
        # One optimizer step: one global batch, in as many micro batches as the memory asks for.
        learning_rate = learning_rate_at(state.step, schedule.total_steps, recipe)
        for group in backend.optimizer.param_groups:
            group["lr"] = learning_rate
        micro_batch_losses: list[MicroBatchLoss] = []
        with contextlib.ExitStack() as in_step:
            for prepared in micro_batches:
                if not (prepared.last or micro_batch_losses):
                    in_step.enter_context(casts_kept(recipe))
                with products_in_tf32(recipe):
                    loss = yield MicroBatch(
                        backend=backend,
                        tensors=tuple(x.to(device, non_blocking=True) for x in prepared.tensors),
                        # Gradients are averaged over ranks: their sum is world_size times that.
                        scale=world_size / prepared.batch_targets,
                        last=prepared.last,
                    )
                micro_batch_losses.append(MicroBatchLoss(documents=prepared.documents, loss=loss))
                if prepared.last:
                    break
        update_norm = backend.update(recipe.max_grad_norm or math.inf)
        state.step += 1
        state.batch += 1
        if state.batch == len(schedule.epoch(state.epoch)):
            state.epoch, state.batch = state.epoch + 1, 0
        line_tokens += prepared.batch_tokens
        queued.append(
            _QueuedStep(
                number=state.step,
                where=_where(job.identity, state, schedule),
                tokens=prepared.batch_tokens,
                targets=prepared.batch_targets,
                micro_batches=micro_batch_losses,
                grad_norm=update_norm,
            )
        )
        settle(keep=_STEPS_QUEUED)

        if state.step % recipe.log_every_steps == 0 or state.step == schedule.total_steps:
            gather_loss()
            now = clock()
            tokens_per_second = line_tokens / max(1e-9, now - line_started)
            line_started, line_tokens = now, 0
            mean_loss = state.loss_sum / state.loss_targets if state.loss_targets else math.nan
            state.loss_sum, state.loss_targets = 0.0, 0
            mfu = None
            if peak_flops is not None and flops is not None:
                mfu = tokens_per_second * flops / (peak_flops * world_size)
            log(
                {
                    "event": "step",
                    **_where(job.identity, state, schedule),
                    "loss": mean_loss,
                    "learning_rate": learning_rate,
                    "grad_norm": grad_norm,
                    "skipped_steps": state.skipped_steps,
                    "tokens": state.tokens,
                    "tokens_per_second": tokens_per_second,
                    "mfu": mfu,
                    "seconds": state.seconds,
                    "peak_memory_bytes": state.peak_memory_bytes,
                }
            )
            steps_left = schedule.total_steps - state.step + job.later_steps(state.step)
            price = recipe.price_usd_per_hour
            run_hours = (job.spent_seconds + stop.seconds) / 3600
            facts = describe_step(
                loss=mean_loss,
                tokens_per_second=tokens_per_second,
                mfu=mfu,
                seconds_left=steps_left * state.seconds / state.step,
                peak_memory_bytes=state.peak_memory_bytes,
                cost_usd=None if price is None else price * run_hours,
            )
            progress.update(name, state.step, schedule.total_steps, facts)
        this_step_seconds = clock() - step_started
        timer.add(this_step_seconds, prepared.batch_tokens)
        step_seconds = max(step_seconds, this_step_seconds)
        every = recipe.checkpoint_every_steps
        if every is not None and state.step % every == 0 and not evaluation_due():
            save()
        stop.reserve(step_seconds + save_seconds)
    if compiled:
        log(
            {
                "event": "compile",
                **_where(job.identity, state, schedule),
                "seconds": compiled_seconds(),
                "expected_seconds": compiling.seconds,
                "expected_saved_seconds": compiling.saved_seconds,
            }
        )
    # Beside others, neither its speed nor what the device holds is its own.
    alone = recipe.placement not in {"concurrent", "shared-base"}
    if accelerator.is_main_process and alone:
        here = TrainedHere(gpu=gpu, device=device, num_processes=world_size)
        record_training(plain_model, recipe, lengths, timer, here)
    backend.close()
    return state


def _where(identity: Identity, state: TrainState, schedule: BatchSchedule) -> dict[str, object]:
    epoch = state.epoch + (state.batch / len(schedule.epoch(state.epoch)) if state.batch else 0)
    return {
        "class_index": identity.class_index,
        "class_name": identity.class_name,
        "step": state.step,
        "epoch": round(epoch, 4),
    }


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: Sequence[dict[str, torch.Tensor]], rank: int) -> None:
    if rank >= len(states):
        return  # more processes than before: this rank keeps its own seed
    torch.set_rng_state(states[rank]["cpu"])
    if "cuda" in states[rank] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[rank]["cuda"])


def _load_optimizer(backend: Backend, saved: dict[str, Any]) -> None:
    backend.load_optimizer_state(saved["optimizer"])
    if backend.scaler is not None and saved["scaler"] is not None:
        backend.scaler.load_state_dict(saved["scaler"])
