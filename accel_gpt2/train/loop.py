"""The training loop of one class: long and flat, so that a whole step can be read at once."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from accel_gpt2.catalog.gpus import GpuSpec
from accel_gpt2.data.batching import Indices, collate, epoch_batches, split_micro_batches
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.errors import UserError
from accel_gpt2.plan.flops import train_flops_per_token
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.checkpoint import (
    Identity,
    TrainState,
    checkpoint_path,
    is_whole,
    point_best_at,
    read_checkpoint,
    rotate,
    save_checkpoint,
    write_array,
)
from accel_gpt2.train.model import LanguageModel
from accel_gpt2.train.optim import build_optimizer, learning_rate_at
from accel_gpt2.train.processes import on_first_process
from accel_gpt2.train.progress import TrainProgress, describe_step
from accel_gpt2.train.scoring import score_documents, to_device
from accel_gpt2.train.stopping import StopRequest

# What a row of log.jsonl goes through: the file, the trackers.
LogRow = Callable[[dict[str, object]], None]

VALIDATION_SCORES = "validation_scores"  # a folder in each class's directory


class BatchSchedule:
    """Every global batch of a training, reachable directly by (epoch, batch)."""

    def __init__(self, lengths: NDArray[Any], recipe: TrainRecipe) -> None:
        self._lengths = lengths
        self._recipe = recipe
        self._epoch = -1
        self._batches: list[Indices] = []
        self.total_steps = self._count_steps()

    def epoch(self, epoch: int) -> list[Indices]:
        """The global batches of an epoch, in order."""
        if epoch != self._epoch:
            self._batches = epoch_batches(
                self._lengths,
                global_batch_tokens=self._recipe.global_batch_tokens,
                global_batch_size=self._recipe.global_batch_size,
                seed=self._recipe.seed,
                epoch=epoch,
            )
            self._epoch = epoch
        return self._batches

    def _count_steps(self) -> int:
        limit = self._recipe.max_steps or math.inf
        whole_epochs = math.floor(self._recipe.epochs)
        steps = 0
        for epoch in range(whole_epochs):
            steps += len(self.epoch(epoch))
            if steps >= limit:
                return int(limit)
        part = self._recipe.epochs - whole_epochs
        if part > 0:
            # Rounded first: 1.1 - 1 is a little more than 0.1, and must not cost a step more.
            steps += math.ceil(round(part * len(self.epoch(whole_epochs)), 6))
        return int(min(steps, limit))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassTraining:
    """One class to train: its documents, its place, and what it may continue from.

    `checkpoint` is a directory that `verify` has passed; None starts from step 0. `validation`
    holds the validation documents of all classes, since the classifier compares models on every
    document; `joint_accuracy` gives the accuracy of the whole classifier from this class's step and
    validation scores, or None while other classes have none. `earlier_seconds` were spent on other
    classes of the run and `later_steps` are still to come in them.
    """

    identity: Identity
    directory: Path
    documents: TokenizedDocuments
    validation: TokenizedDocuments
    model: LanguageModel
    checkpoint: Path | None
    joint_accuracy: Callable[[int, NDArray[np.float64]], float | None]
    num_classes: int
    earlier_seconds: float
    later_steps: int


def validation_scores_path(class_directory: Path, step: int) -> Path:
    """Where log p(x) of every validation document is kept, float64, one file per evaluation."""
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
    """Train one class to the end of its schedule and return the final state.

    The loss of a step is the sum of its token losses over the number of predicted tokens in the
    global batch, over all ranks and micro batches; so neither their number nor their size changes
    the result beyond rounding.

    Raises:
        StoppedEarly: by a signal or the time limit, after saving.
        UserError: when gradients are zero at the first step, a loss is no longer finite, or the
            disk is full.
    """
    device: torch.device = accelerator.device
    world_size: int = accelerator.num_processes
    rank: int = accelerator.process_index
    lengths = job.documents.lengths
    schedule = BatchSchedule(lengths, recipe)
    own_validation = np.flatnonzero(job.validation.labels == job.identity.class_index)
    flops = _flops_per_token(job.model, lengths, recipe)
    peak_flops = _peak_flops(gpu, recipe.mixed_precision)
    name = f"{job.identity.class_name} ({job.identity.class_index + 1}/{job.num_classes})"

    checkpoint = None if job.checkpoint is None else read_checkpoint(job.checkpoint)
    optimizer = build_optimizer(job.model, recipe)
    if checkpoint is not None:
        job.model.load_trainable_state(checkpoint.weights)
    plain_model = job.model
    model, optimizer = accelerator.prepare(job.model, optimizer)
    parameters = [parameter for parameter in plain_model.parameters() if parameter.requires_grad]
    # Dropout must differ between ranks; nothing else in the loop draws random numbers.
    torch.manual_seed(recipe.seed + 1_000_003 * (rank + 1))
    # The accelerator has one for all classes, and none of them may depend on the one before.
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(device.type).state_dict())
    state = TrainState()
    saved: tuple[int, int] | None = None  # (step, evaluated_step) of what is on the disk
    if checkpoint is not None:
        state = checkpoint.state
        _load_optimizer(accelerator, optimizer, checkpoint.optimizer)
        _set_random_state(checkpoint.random_states, rank)
        if job.checkpoint == checkpoint_path(job.directory, state.step):
            saved = (state.step, state.evaluated_step)
        best_path = checkpoint_path(job.directory, state.best_step)
        if state.best_step >= 0 and not on_first_process(accelerator, lambda: is_whole(best_path)):
            # What comes is compared with what there is: this step again, if it is one to evaluate.
            state.best_step, state.best_bits_per_token = -1, math.inf
            state.evaluated_step, saved = -1, None
    del checkpoint  # 12 bytes a parameter

    running_loss = torch.zeros((), dtype=torch.float64, device=device)
    running_tokens = 0
    grad_norm = torch.zeros(())
    started = time.monotonic()
    seconds_before = state.seconds
    line_started, line_tokens = started, 0

    def gather_loss() -> None:
        """Move the loss summed on the devices into the state; it waits for all work on a GPU."""
        nonlocal running_tokens
        if world_size > 1:
            torch.distributed.all_reduce(running_loss)
        state.loss_sum += float(running_loss)
        state.loss_tokens += running_tokens
        running_loss.zero_()
        running_tokens = 0
        state.seconds = seconds_before + time.monotonic() - started
        state.peak_memory_bytes = max(state.peak_memory_bytes, peak_memory_bytes(device))
        if not math.isfinite(state.loss_sum):
            raise diverged("loss", state.loss_sum)

    def diverged(what: str, value: float) -> UserError:
        return UserError(
            f"{name}: the {what} is {value} after step {state.step}, and nothing was saved from "
            "that; give --resume never and a smaller --learning-rate to start anew, or "
            "--mixed-precision bf16 where it is fp16."
        )

    def save() -> None:
        nonlocal saved
        if saved == (state.step, state.evaluated_step):
            return
        gather_loss()
        random_states = _gather(accelerator, _random_state(device))

        def write() -> None:
            save_checkpoint(
                job.directory,
                state=state,
                identity=job.identity,
                weights=plain_model.trainable_state(),
                optimizer=_optimizer_state(accelerator, optimizer),
                random_states=random_states,
            )
            if state.best_step >= 0:
                point_best_at(checkpoint_path(job.directory, state.best_step))
            rotate(job.directory, keep=recipe.keep_checkpoints, best_step=state.best_step)

        on_first_process(accelerator, write)
        saved = (state.step, state.evaluated_step)

    def evaluate() -> None:
        """Score the validation documents, note whether this is the best model so far, and save."""
        total = len(job.validation)
        done = 0
        progress.start(f"{name} validation", total)

        def on_batch(num_documents: int) -> None:
            nonlocal done
            done += num_documents
            progress.update(f"{name} validation", done, total, "")
            stopped = stop.reason(device)
            if stopped is not None:
                save()  # not evaluated yet: a later start begins with this evaluation
                raise stopped

        scores = score_documents(
            plain_model,
            job.validation,
            micro_batch_tokens=recipe.micro_batch_tokens,
            accelerator=accelerator,
            on_batch=on_batch,
        )
        nats = -scores[own_validation].sum()
        bits = float(nats / math.log(2))
        bits_per_token = bits / int((job.validation.lengths[own_validation] - 1).sum())
        bits_per_byte = bits / max(1, int(job.validation.num_bytes[own_validation].sum()))
        if not math.isfinite(bits):
            raise diverged("validation loss", bits)
        accuracy = job.joint_accuracy(state.step, scores)
        state.evaluated_step = state.step
        best = bits_per_token < state.best_bits_per_token
        if best:
            state.best_step, state.best_bits_per_token = state.step, bits_per_token
        scores_path = validation_scores_path(job.directory, state.step)
        on_first_process(accelerator, lambda: write_array(scores_path, scores))
        log(
            {
                "event": "evaluate",
                **_where(job.identity, state, schedule),
                "validation_bits_per_token": bits_per_token,
                "validation_bits_per_byte": bits_per_byte,
                "best": best,
                "joint_validation_accuracy": accuracy,
            }
        )
        save()
        joint = "" if accuracy is None else f" · joint validation accuracy {accuracy:.4f}"
        progress.say(
            f"{name} step {state.step}/{schedule.total_steps} · validation "
            f"{bits_per_token:.4f} bits/token{' (best)' if best else ''}{joint}"
        )
        progress.start(name, schedule.total_steps, state.step)

    def evaluation_due() -> bool:
        if state.evaluated_step == state.step:
            return False
        every = recipe.evaluate_every_steps
        at_interval = state.batch == 0 if every is None else state.step % every == 0
        return state.step == schedule.total_steps or (state.step > 0 and at_interval)

    model.train()
    progress.start(name, schedule.total_steps, state.step)
    while True:
        if evaluation_due():
            evaluate()
            line_started, line_tokens = time.monotonic(), 0
        if state.step == schedule.total_steps:
            break
        stopped = stop.reason(device)
        if stopped is not None:
            if state.step > 0:
                save()
            raise stopped

        # One optimizer step: one global batch, in as many micro batches as the memory asks for.
        batch = schedule.epoch(state.epoch)[state.batch]
        batch_tokens = int((lengths[batch] - 1).sum())
        micro_batches = split_micro_batches(
            lengths, batch, world_size=world_size, micro_batch_tokens=recipe.micro_batch_tokens
        )
        learning_rate = learning_rate_at(state.step, schedule.total_steps, recipe)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        for number, per_rank in enumerate(micro_batches, start=1):
            documents = [job.documents.document(int(index)) for index in per_rank[rank]]
            tensors = to_device(collate(documents), device)
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                loss = model(*tensors)
                # DDP averages over ranks, so the sum over ranks is world_size times that.
                accelerator.backward(loss * (world_size / batch_tokens))
            running_loss += loss.detach()
        grad_norm = accelerator.clip_grad_norm_(parameters, recipe.max_grad_norm or math.inf)
        if state.step == 0 and float(grad_norm) == 0.0:
            raise UserError(
                f"{name}: every gradient of the first step is zero, so nothing would be learnt; "
                "check the fine-tuning options (lora_target_modules, gradient_checkpointing)."
            )
        optimizer.step()
        optimizer.zero_grad()
        stop.saving = True

        state.step += 1
        state.batch += 1
        if state.batch == len(schedule.epoch(state.epoch)):
            state.epoch, state.batch = state.epoch + 1, 0
        state.tokens += batch_tokens
        running_tokens += batch_tokens
        line_tokens += batch_tokens

        if state.step % recipe.log_every_steps == 0 or state.step == schedule.total_steps:
            gather_loss()
            now = time.monotonic()
            tokens_per_second = line_tokens / max(1e-9, now - line_started)
            line_started, line_tokens = now, 0
            mean_loss = state.loss_sum / state.loss_tokens
            state.loss_sum, state.loss_tokens = 0.0, 0
            mfu = None
            if peak_flops is not None and flops is not None:
                mfu = tokens_per_second * flops / (peak_flops * world_size)
            log(
                {
                    "event": "step",
                    **_where(job.identity, state, schedule),
                    "loss": mean_loss,
                    "learning_rate": learning_rate,
                    "grad_norm": float(grad_norm),
                    "tokens": state.tokens,
                    "tokens_per_second": tokens_per_second,
                    "mfu": mfu,
                    "seconds": state.seconds,
                    "peak_memory_bytes": state.peak_memory_bytes,
                }
            )
            steps_left = schedule.total_steps - state.step + job.later_steps
            price = recipe.price_usd_per_hour
            run_hours = (job.earlier_seconds + state.seconds) / 3600
            facts = describe_step(
                loss=mean_loss,
                tokens_per_second=tokens_per_second,
                mfu=mfu,
                seconds_left=steps_left * state.seconds / state.step,
                peak_memory_bytes=state.peak_memory_bytes,
                cost_usd=None if price is None else price * run_hours,
            )
            progress.update(name, state.step, schedule.total_steps, facts)
        every = recipe.checkpoint_every_steps
        if every is not None and state.step % every == 0 and not evaluation_due():
            save()
    return state


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _where(identity: Identity, state: TrainState, schedule: BatchSchedule) -> dict[str, object]:
    epoch = state.epoch + (state.batch / len(schedule.epoch(state.epoch)) if state.batch else 0)
    return {
        "class_index": identity.class_index,
        "class_name": identity.class_name,
        "step": state.step,
        "epoch": round(epoch, 4),
    }


def _flops_per_token(
    model: LanguageModel, lengths: NDArray[Any], recipe: TrainRecipe
) -> float | None:
    """What MFU is measured against; None where the architecture's arithmetic is not known."""
    config = model.transformers_model.config
    sizes = [getattr(config, key, None) for key in ("n_layer", "n_embd", "vocab_size")]
    if config.model_type != "gpt2" or None in sizes:
        return None
    n_layer, n_embd, vocab_size = (int(size) for size in sizes if size is not None)

    def full(context_tokens: float) -> float:
        return train_flops_per_token(
            n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size, context_tokens=context_tokens
        )

    # The mean over tokens: a long document has more tokens, and each of them the long context.
    tokens = np.asarray(lengths, dtype=np.float64) - 1
    flops = full(float((tokens**2).sum() / tokens.sum()))
    # A frozen base has no weight gradients: 4 operations per weight in place of 6.
    return flops - full(0) / 3 if recipe.finetuning == "lora" else flops


def _peak_flops(gpu: GpuSpec | None, mixed_precision: str) -> float | None:
    if gpu is None:
        return None
    return gpu.peak_flops.get({"no": "fp32"}.get(mixed_precision, mixed_precision))


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


def _gather(accelerator: Any, item: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    if accelerator.num_processes == 1:
        return [item]
    gathered: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, item)
    return gathered


def _optimizer_state(accelerator: Any, optimizer: Any) -> dict[str, Any]:
    scaler = getattr(accelerator, "scaler", None)
    return {
        "optimizer": optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }


def _load_optimizer(accelerator: Any, optimizer: Any, saved: dict[str, Any]) -> None:
    optimizer.load_state_dict(saved["optimizer"])
    scaler = getattr(accelerator, "scaler", None)
    if scaler is not None and saved["scaler"] is not None:
        scaler.load_state_dict(saved["scaler"])


def append_json_line(path: Path, row: dict[str, object]) -> None:
    """Add one line to a log; a NaN becomes null, since JSON has none."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean, ensure_ascii=False) + "\n")
