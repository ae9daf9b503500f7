"""What a launcher was asked for, and whether that is what runs: silence here costs days.

What `accelerate launch` was asked for is in the variables that it sets; no torch is needed for it.
"""

import json
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from accel_gpt2.catalog.strategies import STRATEGIES, ShardingStrategy
from accel_gpt2.errors import UserError
from accel_gpt2.parent import WAITED_FOR_BY
from accel_gpt2.render.accelerate import FSDP2_SETTINGS
from accel_gpt2.render.deepspeed import deepspeed_config


def launched_strategy(environ: Mapping[str, str]) -> ShardingStrategy:
    """The strategy that this process was launched with.

    Raises:
        UserError: for what is no strategy of ours, which would train in another way than the plan
            says, and for one process that was launched as if it were several.
    """
    if (
        "ACCELERATE_MIXED_PRECISION" in environ  # which `accelerate launch` sets always
        and "MASTER_PORT" in environ
        and "WORLD_SIZE" not in environ
        and WAITED_FOR_BY not in environ  # our own launcher asks for what our files can give
    ):
        raise UserError(
            "The launcher was asked for several processes and started this one alone, as `--cpu` "
            "and MULTI_CPU make it do: give `accelerate launch --config_file "
            "accelerate_configs/cpu.yaml --num_processes N`, or unset MASTER_PORT for one process."
        )
    for variable, what in _UNSUPPORTED.items():
        if _is_set(environ, variable):
            raise UserError(f"The launcher asks for {what}, which is not supported: {_USE_OURS}.")
    if _is_set(environ, "ACCELERATE_USE_DEEPSPEED"):
        row = _deepspeed_strategy(environ)
    elif _is_set(environ, "ACCELERATE_USE_FSDP"):
        row = _fsdp2_strategy(environ)
    else:
        row = STRATEGIES["ddp" if _world_size(environ) > 1 else "single"]
    if _world_size(environ) < row.smallest_world_size:
        raise UserError(
            f"The launcher asks for {row.name} and started one process, which has nobody to share "
            "with: give `accelerate launch --num_processes 2` or more, or `--config_file "
            "accelerate_configs/single.yaml`."
        )
    return row


_USE_OURS = "launch with one of our files, such as `--config_file accelerate_configs/fsdp2.yaml`"

_UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def _is_set(environ: Mapping[str, str], variable: str) -> bool:
    return environ.get(variable, "").lower() in {"1", "true", "yes"}


def _world_size(environ: Mapping[str, str]) -> int:
    return int(environ.get("WORLD_SIZE", "1"))


def _fsdp2_strategy(environ: Mapping[str, str]) -> ShardingStrategy:
    for key, value in FSDP2_SETTINGS.items():
        ours = str(value)
        theirs = environ.get(key.upper(), "1" if key == "fsdp_version" else ours)
        if theirs.lower() != ours.lower():
            raise UserError(
                f"The launcher asks for FSDP with {key} = {theirs}, and this trains with {ours}: "
                f"{_USE_OURS}."
            )
    return STRATEGIES["fsdp2"]


def _deepspeed_strategy(environ: Mapping[str, str]) -> ShardingStrategy:
    name = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if not name:
        raise UserError(
            "The launcher asks for DeepSpeed without a deepspeed_config_file: launch with one of "
            "our files, such as `--config_file accelerate_configs/zero3.yaml`."
        )
    try:
        config = json.loads(Path(name).read_text(encoding="utf-8"))
        stage = config["zero_optimization"]["stage"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"The launcher's deepspeed_config_file {name} cannot be read ({error}): write it by "
            "`accel-gpt2 configs copy .` and launch in the same directory."
        ) from None
    differences = {
        row: list(_differences(config, deepspeed_config(row)))
        for row in STRATEGIES.values()
        if row.backend == "deepspeed"
    }
    # Of the same stage if there is one, so that what is said is what the person changed.
    row = min(differences, key=lambda row: (row.zero_stage != stage, len(differences[row])))
    if differences[row]:
        raise UserError(
            f"{name} is not the {row.name} that is planned with: {'; '.join(differences[row])}. "
            "Write it again by `accel-gpt2 configs copy .`, or change the strategy's row in "
            "accel_gpt2/catalog/strategies.py."
        )
    return row


def _differences(theirs: object, ours: object, key: str = "") -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in sorted({*theirs, *ours}):
            path = f"{key}.{name}" if key else name
            yield from _differences(theirs.get(name, "absent"), ours.get(name, "absent"), path)
    elif theirs != ours:
        yield f"{key} is {theirs}, not {ours}"


def check_started(accelerator: Any, environ: Mapping[str, str]) -> None:
    """Check on every rank that world size and strategy are what the launcher was asked for.

    Accelerate starts one process in place of several, several that never meet, or DDP in place of
    DeepSpeed, and says nothing.

    Raises:
        UserError: when they are not, or when the launcher set what would have no effect.
    """
    _check_world_size(accelerator, environ)
    _check_strategy(accelerator, environ)
    _check_settings(accelerator, environ)


_BACKENDS = {"NO": "none", "MULTI_CPU": "ddp", "MULTI_GPU": "ddp", "FSDP": "fsdp2"}


def _check_world_size(accelerator: Any, environ: Mapping[str, str]) -> None:
    world_size = _world_size(environ)
    if accelerator.num_processes != world_size:
        raise UserError(
            f"The launcher started {world_size} processes and Accelerate sees "
            f"{accelerator.num_processes}: they would train apart from one another. Without a GPU "
            "give launch/train.py --profile cpu."
        )
    if accelerator.device.type == "cuda":
        import torch

        there = torch.cuda.device_count()
        here = int(environ.get("LOCAL_WORLD_SIZE", world_size))
        if here > there:
            raise UserError(
                f"The launcher started {here} processes for {there} GPUs, and they would share "
                f"them: give `accelerate launch --num_processes {there}`."
            )


def _check_strategy(accelerator: Any, environ: Mapping[str, str]) -> None:
    asked = launched_strategy(environ)
    kind = accelerator.distributed_type.value
    backend = _BACKENDS.get(kind, kind.lower())
    alone = accelerator.num_processes == 1 and {asked.backend, backend} <= {"none", "ddp"}
    if backend == asked.backend or alone:
        return
    hint = (
        "unset ACCELERATE_USE_CPU, which turns it into that"
        if _is_set(environ, "ACCELERATE_USE_CPU")
        else _USE_OURS
    )
    raise UserError(
        f"The launcher was asked for {asked.name}, and Accelerate made {kind} of it: {hint}."
    )


def _check_settings(accelerator: Any, environ: Mapping[str, str]) -> None:
    problems = []
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in {"no", accelerator.mixed_precision}:
        problems.append(
            f"--mixed_precision {precision} of the launcher has no effect, because the recipe "
            f"says {accelerator.mixed_precision}: give --mixed-precision after launch/train.py."
        )
    if environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in {"1", "auto"}:
        problems.append(
            "The launcher's gradient_accumulation_steps has no effect: give --global-batch-tokens "
            "after launch/train.py."
        )
    if environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto") != "auto":
        problems.append(
            "The launcher's gradient_clipping has no effect: give --set max_grad_norm=... after "
            "launch/train.py."
        )
    if problems:
        raise UserError("\n".join(problems))


_LINKS = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")


def avoid_broken_links(environ: MutableMapping[str, str]) -> str | None:
    """Have NCCL go through host memory where older drivers of the RTX 40 series hang or lie.

    `accelerate launch` does so for what it starts; this is for other launchers. What the person has
    set stays. Returns what is to be said, None where nothing is changed.
    """
    unset = [name for name in _LINKS if name not in environ]
    from accelerate.utils.environment import check_cuda_p2p_ib_support  # PR 2195

    if not unset or check_cuda_p2p_ib_support():
        return None
    environ.update(dict.fromkeys(unset, "1"))
    return (
        "NVIDIA drivers before 550.40.07 have RTX 40 cards exchange by ways that they have not: "
        f"{' and '.join(f'{name}=1' for name in unset)} are set. A newer driver is faster."
    )
