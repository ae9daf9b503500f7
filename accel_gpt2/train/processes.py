"""The processes of a run: Accelerate's view of them, checked against what was asked for."""

import os
from pathlib import Path
from typing import Any

import torch

from accel_gpt2.catalog.gpus import GpuSpec, find_gpu
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import TrainRecipe


def is_first_process() -> bool:
    """Whether this process is the one that talks and writes, before Accelerate is loaded."""
    return int(os.environ.get("RANK", "0")) == 0


def build_accelerator(recipe: TrainRecipe, run_directory: Path | None = None) -> Any:
    """Accelerate's `Accelerator` for this process, with the recipe's precision and trackers.

    Args:
        run_directory: where trackers write; None for scoring, which has no trackers.

    Raises:
        UserError: when the launcher started another number of processes than Accelerate sees, the
            precision needs a GPU, or a tracker is not installed.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

    on_cpu = not torch.cuda.is_available()
    if on_cpu and recipe.mixed_precision == "fp16":
        raise UsageError(
            "mixed_precision = 'fp16' needs a GPU and none was found; give --mixed-precision no."
        )
    trackers: list[str] = []
    options: dict[str, Any] = {}
    if run_directory is not None and recipe.trackers:
        trackers = _check_trackers(recipe.trackers)
        options["project_config"] = ProjectConfiguration(
            project_dir=str(run_directory), logging_dir=str(run_directory / "trackers")
        )
    # One process may train in fp32 and then in bf16; Accelerate's shared state would refuse.
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=recipe.mixed_precision,
        log_with=trackers or None,
        **options,
    )
    # Some launcher settings start N processes that never meet, or one in place of N, and exit 0.
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world_size:
        raise UserError(
            f"The launcher started {world_size} processes and Accelerate sees "
            f"{accelerator.num_processes}: they would train apart from one another. Without a GPU "
            "start several processes with `torchrun --nproc_per_node N launch/train.py ...`."
        )
    if trackers:
        accelerator.init_trackers("accel-gpt2")
    return accelerator


def leave_processes() -> None:
    """End the process group, if there is one: the last thing that a launched process does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def current_gpu(accelerator: Any) -> GpuSpec | None:
    """The catalog row of the GPU in use; None on a CPU and for a GPU that has no row."""
    if accelerator.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(accelerator.device)
    return find_gpu(properties.name, properties.total_memory)


def _check_trackers(names: tuple[str, ...]) -> list[str]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.tracking import get_available_trackers as installed_trackers

    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    installed = {str(name) for name in installed_trackers()}
    for name in names:
        if name not in known:
            raise UsageError(f"The tracker {name!r} is unknown; Accelerate has {', '.join(known)}.")
        if name not in installed:
            raise UserError(
                f"The tracker {name!r} is not installed; type `pip install {name}`, or leave it "
                "out of --set trackers=..."
            )
    if "wandb" in names and not _has_wandb_key():
        # Without a key wandb would stop and ask.
        os.environ.setdefault("WANDB_MODE", "offline")
    return list(names)


def _has_wandb_key() -> bool:
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return "WANDB_API_KEY" in os.environ or (
        netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    )
