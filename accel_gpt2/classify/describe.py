"""What a run says about itself before it trains: plan.json, environment.json, the first lines."""

import dataclasses
import math
import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import accel_gpt2
from accel_gpt2.classify.parts import Part
from accel_gpt2.classify.prepare import PreparedData
from accel_gpt2.plan.steps import num_saves
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.objective import TrainedModel
from accel_gpt2.train.optim import optimizer_state_bytes
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.quantized import num_weights
from accel_gpt2.train.schedule import BatchSchedule
from accel_gpt2.train.startup import launched_strategy
from accel_gpt2.units import format_bytes, format_count
from accel_gpt2.versions import installed_versions


def describe_plan(
    recipe: TrainRecipe,
    data: PreparedData,
    model: TrainedModel,
    parts: Sequence[Part],
    steps: list[int],
    world_size: int,
) -> dict[str, Any]:
    """The content of plan.json: classes, sizes, steps, bytes, and what was done to the data.

    `written_bytes` is for a run that nothing stops; each stop writes a checkpoint more.

    Args:
        model: of the first part; those of the others are of the same size.
        steps: optimizer steps of each part.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = list(model.finals[0].parameters())
    num_parameters = sum(num_weights(p) for p in parameters)
    num_trainable = sum(p.numel() for p in parameters if p.requires_grad)
    # Weights and what the optimizer keeps; random states and JSON are a few KiB.
    checkpoint_bytes = sum(p.nbytes for p in trained) + optimizer_state_bytes(trained, recipe)
    exported_bytes = len(model.finals) * sum(
        p.nbytes for p in parameters if recipe.finetuning == "full" or p.requires_grad
    )
    own = [part.own(data.train) for part in parts]
    saves = [
        num_saves(recipe, total, _steps_per_epoch(recipe, total, data.train.lengths[indices]))
        for total, indices in zip(steps, own, strict=True)
    ]
    names = [part.name for part in parts]
    return {
        "model": recipe.model,
        "dataset": recipe.dataset,
        "objective": recipe.objective,
        "class_names": list(data.text.class_names),
        "class_counts": data.class_counts,
        "validation_documents": len(data.validation.labels),
        "num_models": sum(len(part.finals) for part in parts),
        "num_parameters": num_parameters,  # of one model
        "num_trainable_parameters": num_trainable,
        "vocab_size": data.tokenizer.vocab_size,
        "steps": dict(zip(names, steps, strict=True)),
        "document_tokens_per_epoch": {
            name: int((data.train.lengths[indices].astype(np.int64) - 1).sum())
            for name, indices in zip(names, own, strict=True)
        },
        "global_batch_tokens": recipe.global_batch_tokens,
        "global_batch_size": recipe.global_batch_size,
        "micro_batch_tokens": recipe.micro_batch_tokens,
        "world_size": world_size,
        "checkpoint_bytes": checkpoint_bytes,
        # The last N, the best one and `final/`; what is saved once cannot be kept twice.
        "kept_bytes": sum(
            checkpoint_bytes * min(count, recipe.keep_checkpoints + 1) + exported_bytes
            for count in saves
        ),
        "written_bytes": sum(checkpoint_bytes * count + exported_bytes for count in saves),
        "truncated_documents": {
            "train": int(data.train.truncated.sum()),
            "validation": int(data.validation.truncated.sum()),
        },
        "data_source": data.text.source,
        "data_fingerprint": data.text.fingerprint,
        "data_treatments": [dataclasses.asdict(treatment) for treatment in data.text.treatments],
    }


def _steps_per_epoch(recipe: TrainRecipe, total_steps: int, lengths: NDArray[Any]) -> int:
    if recipe.max_steps is None or total_steps < recipe.max_steps:
        return math.ceil(total_steps / recipe.epochs)
    return len(BatchSchedule(lengths, recipe, total_steps=total_steps).epoch(0))


def announce_plan(
    progress: TrainProgress, plan: dict[str, Any], run_directory: Path, accelerator: Any
) -> None:
    """Say how much there is to do and to write, and what was done to the data."""
    steps = sum(plan["steps"].values())
    where = str(accelerator.device)
    if accelerator.num_processes > 1:
        where = f"{accelerator.num_processes} processes ({where})"
    progress.say(
        f"{plan['num_models']} model{'' if plan['num_models'] == 1 else 's'} of "
        f"{format_count(plan['num_parameters'])} parameters "
        f"({format_count(plan['num_trainable_parameters'])} trained), {steps} steps in all, on "
        f"{where}"
    )
    free = shutil.disk_usage(run_directory).free
    checkpoint, kept = plan["checkpoint_bytes"], plan["kept_bytes"]
    progress.say(
        f"A checkpoint is {format_bytes(checkpoint)}; the run writes "
        f"{format_bytes(plan['written_bytes'])} and keeps at most {format_bytes(kept)} on the disk "
        f"({format_bytes(free)} free)"
    )
    # A checkpoint is written before an older one goes.
    needed = kept + checkpoint - _held_bytes(run_directory)
    if needed > free:
        progress.say(
            f"Warning: the disk of {run_directory} has {format_bytes(free)} free, and the run may "
            f"need {format_bytes(needed)} more: make room before it stops for lack of it, or give "
            "--set keep_checkpoints=1"
        )
    for treatment in plan["data_treatments"]:
        progress.say(f"Data: {treatment['what']}")


def _held_bytes(run_directory: Path) -> int:
    """What the classes of a run that goes on have on the disk already."""
    folders = ("checkpoint-*", "final")
    files = (path for name in folders for path in run_directory.glob(f"class-*/{name}/*"))
    return sum(path.stat().st_size for path in files)


def describe_environment() -> dict[str, object]:
    """The content of environment.json: versions and machine; nothing of the user's variables."""

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "gpus": ", ".join(gpus) or "none",
        "cuda": torch.version.cuda,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "strategy": launched_strategy(os.environ).name,
        "accel-gpt2": accel_gpt2.__version__,
        **installed_versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
