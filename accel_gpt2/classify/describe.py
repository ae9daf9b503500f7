"""What a run says about itself before it trains: plan.json, environment.json, the first lines."""

import dataclasses
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import accel_gpt2
from accel_gpt2.classify.prepare import PreparedData
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.model import LanguageModel
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.units import format_bytes, format_count
from accel_gpt2.versions import installed_versions


def describe_plan(
    recipe: TrainRecipe,
    data: PreparedData,
    model: LanguageModel,
    by_class: list[NDArray[np.int64]],
    steps: list[int],
    world_size: int,
) -> dict[str, Any]:
    """The content of plan.json: classes, sizes, steps, bytes, and what was done to the data.

    Args:
        by_class: indices of each class's training documents.
        steps: optimizer steps of each class.
    """
    parameters = list(model.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # Weights and two moments in fp32: what AdamW writes; the other optimizers write less.
    checkpoint_bytes = 12 * trained
    names = data.text.class_names
    return {
        "model": recipe.model,
        "dataset": recipe.dataset,
        "class_names": list(names),
        "class_counts": data.class_counts,
        "validation_documents": len(data.validation.labels),
        "num_parameters": sum(p.numel() for p in parameters),
        "num_trainable_parameters": trained,
        "vocab_size": data.tokenizer.vocab_size,
        "steps_per_class": dict(zip(names, steps, strict=True)),
        "document_tokens_per_epoch": {
            name: int((data.train.lengths[indices].astype(np.int64) - 1).sum())
            for name, indices in zip(names, by_class, strict=True)
        },
        "global_batch_tokens": recipe.global_batch_tokens,
        "global_batch_size": recipe.global_batch_size,
        "micro_batch_tokens": recipe.micro_batch_tokens,
        "world_size": world_size,
        "checkpoint_bytes": checkpoint_bytes,
        "kept_bytes": len(names) * (checkpoint_bytes * (recipe.keep_checkpoints + 1) + 4 * trained),
        "truncated_documents": {
            "train": int(data.train.truncated.sum()),
            "validation": int(data.validation.truncated.sum()),
        },
        "data_source": data.text.source,
        "data_fingerprint": data.text.fingerprint,
        "data_treatments": [dataclasses.asdict(treatment) for treatment in data.text.treatments],
    }


def announce_plan(
    progress: TrainProgress, plan: dict[str, Any], run_directory: Path, accelerator: Any
) -> None:
    """Say how much there is to do and to write, and what was done to the data."""
    steps = sum(plan["steps_per_class"].values())
    where = str(accelerator.device)
    if accelerator.num_processes > 1:
        where = f"{accelerator.num_processes} processes ({where})"
    progress.say(
        f"{len(plan['class_names'])} models of {format_count(plan['num_parameters'])} parameters "
        f"({format_count(plan['num_trainable_parameters'])} trained), {steps} steps in all, on "
        f"{where}"
    )
    free = shutil.disk_usage(run_directory).free
    progress.say(
        f"A checkpoint is {format_bytes(plan['checkpoint_bytes'])}; the run keeps at most "
        f"{format_bytes(plan['kept_bytes'])} on the disk ({format_bytes(free)} free)"
    )
    for treatment in plan["data_treatments"]:
        progress.say(f"Data: {treatment['what']}")


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
        "accel-gpt2": accel_gpt2.__version__,
        **installed_versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
