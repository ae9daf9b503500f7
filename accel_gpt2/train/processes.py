"""The processes of a run: Accelerate's view of them, checked against what was asked for."""

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from accel_gpt2.catalog.gpus import GpuSpec, find_gpu
from accel_gpt2.catalog.strategies import STRATEGIES, ShardingStrategy
from accel_gpt2.data.quiet import only_errors_of_deepspeed
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.failures import ending
from accel_gpt2.recipe import TrainRecipe, autocast_precision
from accel_gpt2.train.host_memory import keep_freed_memory
from accel_gpt2.train.peers import COLLECTIVE_TIMEOUT, PeerFailedError
from accel_gpt2.train.startup import check_started

T = TypeVar("T")


def is_first_process() -> bool:
    """Whether this process is the one that talks and writes, before Accelerate is loaded."""
    return int(os.environ.get("RANK", "0")) == 0


def build_accelerator(recipe: TrainRecipe, run_directory: Path | None = None) -> Any:
    """Accelerate's `Accelerator` for this process, with the recipe's precision and trackers.

    Trackers write nothing before `start_trackers`.

    Args:
        run_directory: where trackers write; None for scoring, which has no trackers.

    Raises:
        UserError: when what runs is not what the launcher was asked for, or the precision needs a
            GPU.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    check_precision(recipe)
    trackers: list[str] = []
    options: dict[str, Any] = {}
    if run_directory is not None and recipe.trackers:
        trackers = list(recipe.trackers)
        options["project_config"] = ProjectConfiguration(
            project_dir=str(run_directory), logging_dir=str(run_directory / "trackers")
        )
    # One process may train in fp32 and then in bf16; Accelerate's shared state would refuse.
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state()
    group = InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)
    with_deepspeed = _is_set("ACCELERATE_USE_DEEPSPEED")
    if with_deepspeed:
        _quiet_deepspeed()
        if on_cpu():
            group.backend = "gloo"
            _use_no_compiled_collectives()
    with_fsdp2 = _is_set("ACCELERATE_USE_FSDP") and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if with_fsdp2:
        options["fsdp_plugin"] = _fsdp2_plugin(recipe)
        _say_that_fsdp2_can_be(group)
    accelerator = Accelerator(
        # It would be DDP in their place.
        cpu=on_cpu() and not with_deepspeed and not with_fsdp2,
        mixed_precision=autocast_precision(recipe.mixed_precision),
        log_with=trackers or None,
        kwargs_handlers=[group],
        **options,
    )
    if with_deepspeed:
        from transformers.integrations import unset_hf_deepspeed_config

        # While it is set, transformers builds models in shards; ZeRO shards ours when it is whole.
        unset_hf_deepspeed_config()
    check_started(accelerator, os.environ)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.num_processes > 1:
        atexit.register(_leave_process_group)
    return accelerator


def _fsdp2_plugin(recipe: TrainRecipe) -> Any:
    """What the launcher's configuration says, with gradients exchanged in fp32."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    computes_in = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.mixed_precision)
    policy = MixedPrecisionPolicy()
    if computes_in is not None:
        # Accelerate's own choice is to round gradients before they are added up, and the loss too.
        policy = MixedPrecisionPolicy(param_dtype=computes_in, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def _say_that_fsdp2_can_be(group: Any) -> None:
    """Have Accelerate shard on CPUs too, and in a process that has done so before.

    It does where it believes in several GPUs, which on CPUs it does not; and having done so once,
    it believes in FSDP, no longer in GPUs. What it believes is all that its public ways lack.
    """
    from accelerate.state import DistributedType, PartialState

    PartialState(cpu=on_cpu(), **group.to_kwargs())
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _quiet_deepspeed() -> None:
    """Its log goes to stderr, from errors up: stdout is for results."""
    import warnings

    only_errors_of_deepspeed()
    from deepspeed.utils import logger

    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    # Two collectives that it calls have new names.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)


def _use_no_compiled_collectives() -> None:
    """Between CPU processes DeepSpeed would compile its own, two minutes long; gloo's will do."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def start_trackers(accelerator: Any) -> None:
    """Open the trackers' files or connections."""
    if accelerator.log_with:
        accelerator.init_trackers("accel-gpt2")


def on_first_process(accelerator: Any, work: Callable[[], T]) -> T:
    """Do `work` on the first process, and give its result to all; they wait for it here.

    Raises:
        PeerFailedError: on the other processes when the work fails on the first one, which raises
            what it failed with. Alone with that, such as a full disk, it would leave the others
            waiting in the next collective.
    """
    if accelerator.num_processes == 1:
        return work()
    outcome: list[Any] = [None, None]  # result, failure
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except Exception as raised:
            error = raised
            code, sentence = ending(raised)
            outcome[1] = (sentence, code)
    torch.distributed.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise PeerFailedError(*outcome[1])
    result: T = outcome[0]
    return result


def gather_objects(accelerator: Any, item: T) -> list[T]:
    """The item of every rank, in order, on all of them."""
    if accelerator.num_processes == 1:
        return [item]
    gathered: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, item)
    return gathered


@contextlib.contextmanager
def one_process_at_a_time(lock_file: Path) -> Iterator[None]:
    """Hold a lock of this machine's launched processes; it needs no process group."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from filelock import FileLock

    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_file):
        yield


def _leave_process_group() -> None:
    # Left to the interpreter's teardown, gloo's destructor now and then never returns. No barrier:
    # a process that leaves on an error of its own would wait in it for the others.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def current_strategy(accelerator: Any) -> ShardingStrategy:
    """How the launcher had this process's model spread over all of them."""
    from accelerate.utils import DistributedType

    match accelerator.distributed_type:
        case DistributedType.NO:
            return STRATEGIES["single"]
        case DistributedType.FSDP:
            return STRATEGIES["fsdp2"]
        case DistributedType.DEEPSPEED:
            zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            offloads = [
                zero.get(f"offload_{what}", {}).get("device", "none") != "none"
                for what in ("optimizer", "param")
            ]
            return next(
                row
                for row in STRATEGIES.values()
                if row.zero_stage == zero["stage"]
                and [row.offloads_optimizer, row.offloads_parameters] == offloads
            )
        case _:
            return STRATEGIES["ddp"]


def current_gpu(accelerator: Any) -> GpuSpec | None:
    """The catalog row of the GPU in use; None on a CPU and for a GPU that has no row."""
    if accelerator.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(accelerator.device)
    return find_gpu(properties.name, properties.total_memory)


def check_precision(recipe: TrainRecipe) -> None:
    """Raise UsageError where the device cannot compute in the recipe's precision."""
    if on_cpu() and recipe.mixed_precision == "fp16":
        raise UsageError(
            "mixed_precision = 'fp16' needs a GPU and none is used; give --mixed-precision no."
        )


def on_cpu() -> bool:
    """Whether models are trained without a GPU."""
    return _is_set("ACCELERATE_USE_CPU") or not torch.cuda.is_available()


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in {"1", "true", "yes"}


def check_trackers(recipe: TrainRecipe) -> None:
    """Raise UserError for a tracker that Accelerate does not know, or that is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.tracking import get_available_trackers as installed_trackers

    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    installed = {str(name) for name in installed_trackers()}
    for name in recipe.trackers:
        if name not in known:
            raise UsageError(f"The tracker {name!r} is unknown; Accelerate has {', '.join(known)}.")
        if name not in installed:
            raise UserError(
                f"The tracker {name!r} is not installed; type `pip install {name}`, or leave it "
                "out of --set trackers=..."
            )
    if "wandb" in recipe.trackers and not _has_wandb_key():
        # Without a key wandb would stop and ask.
        os.environ.setdefault("WANDB_MODE", "offline")


def _has_wandb_key() -> bool:
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return "WANDB_API_KEY" in os.environ or (
        netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    )
