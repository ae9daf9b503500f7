"""What plans say of host memory where ZeRO offloads, against what a process holds.

    python benchmarks/offload_on_gpu.py [--seconds 120] [--output docs/benchmarks]
    python benchmarks/offload_on_gpu.py --device cpu --sizes tiny      # a rehearsal without a GPU

Each row is a process of its own, launched with the strategy's own file: two steps of two micro
batches in bf16, and the whole weights and optimizer state gathered as a checkpoint has them. Host
memory is the most that was resident (`ru_maxrss`), what of it is pinned is torch's own count: its
allocator rounds each piece up to a power of two. It needs DeepSpeed, and no network.

Exit code 1 when a process needed more host memory than its plan says.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_options import gpu_options, is_there
from results import say

from accel_gpt2.catalog.gpus import find_gpu
from accel_gpt2.catalog.models import MODELS
from accel_gpt2.catalog.profiles import PROFILES, HardwareProfile
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.plan.memory import plan_memory
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.render.accelerate import ACCELERATE_DIRECTORY, config_files
from accel_gpt2.train.backend import build_backend
from accel_gpt2.train.calibration import unknown_gpu
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import to_device
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.units import GIB, MIB

_OFFLOADING = ("zero2_offload", "zero3_offload")
_CASES = {
    "all": [(strategy, model) for model in ("gpt2", "gpt2-large") for strategy in _OFFLOADING],
    "tiny": [(strategy, "gpt2-tiny") for strategy in _OFFLOADING],
}
_MICRO_BATCHES = 2


def main() -> int:
    """Measure, write the table, and say whether the plans hold."""
    parser = gpu_options(__doc__, seconds=120.0)
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        model, file = options.measure
        Path(file).write_text(json.dumps(_measure(model)), "utf-8")
        return 0
    if not is_there(options.device):
        return 2
    profile = _profile(options.device)
    rows, left_out = [], []
    until = time.monotonic() + options.seconds
    for strategy, model in _CASES[options.sizes]:
        try:
            row = _launch(strategy, model, options.device, until - time.monotonic())
        except subprocess.TimeoutExpired:
            left_out.append(f"{strategy}, {model}: no time left")
            continue
        rows.append(
            {"strategy": strategy, "model": model, **row, **_plan(strategy, model, profile)}
        )
        say(_row(rows[-1]))
    say(f"wrote {_write(options.output, profile, rows, left_out)}")
    return 1 if any(row["resident_bytes"] > row["planned_host_bytes"] for row in rows) else 0


def _profile(device: str) -> HardwareProfile:
    if device == "cpu":
        return PROFILES["cpu"]
    properties = torch.cuda.get_device_properties(0)
    gpu = find_gpu(properties.name, properties.total_memory) or unknown_gpu(torch.device("cuda"))
    return HardwareProfile(
        name="here", gpu=gpu, num_gpus=1, interconnect="none", host_memory_bytes=0
    )


def _recipe(model: str) -> TrainRecipe:
    documents, length = (4, 64) if model == "gpt2-tiny" else (2, 1024)
    return TrainRecipe(
        model=model,
        init="scratch",
        max_length=length + 1,
        micro_batch_tokens=documents * length,
        global_batch_tokens=None,
        global_batch_size=documents * _MICRO_BATCHES,
        mixed_precision="bf16",
        gradient_checkpointing=True,
        trackers=(),
    )


def _plan(strategy: str, model: str, profile: HardwareProfile) -> dict[str, int]:
    recipe = _recipe(model)
    plan = plan_memory(
        recipe, MODELS[model], profile, STRATEGIES[strategy], longest_tokens=recipe.max_length
    )
    return {"planned_host_bytes": plan.host_bytes, "planned_device_bytes": plan.allocated_bytes}


def _launch(strategy: str, model: str, device: str, timeout: float) -> dict[str, int]:
    """What `_measure` finds in a process that is launched with a strategy's file."""
    with tempfile.TemporaryDirectory() as folder:
        for path, text in config_files(folder).items():
            (Path(folder) / path).parent.mkdir(exist_ok=True)
            (Path(folder) / path).write_text(text, "utf-8")
        measured = Path(folder) / "measured.json"
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"),
            *("--config_file", f"{folder}/{ACCELERATE_DIRECTORY}/{strategy}.yaml"),
            *(__file__, "--measure", model, str(measured)),
        ]
        environment = {**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        subprocess.run(command, env=environment, check=True, timeout=max(1.0, timeout))
        found: dict[str, int] = json.loads(measured.read_text("utf-8"))
        return found


def _measure(name: str) -> dict[str, Any]:
    """Two steps and what a checkpoint gathers, in this process."""
    recipe, spec = _recipe(name), MODELS[name]
    accelerator = build_accelerator(recipe)
    model = build_model(recipe, vocab_size=spec.vocab_size, eos_token_id=spec.vocab_size - 1)
    backend = build_backend(accelerator, model, recipe)
    random = np.random.default_rng(0)
    documents = [
        random.integers(0, spec.vocab_size, recipe.max_length)
        for _ in range(recipe.micro_batch_tokens // (recipe.max_length - 1))
    ]
    labels = np.zeros(len(documents), dtype=np.int64)
    started = 0.0
    for _ in range(2):
        started = time.monotonic()
        for number in range(_MICRO_BATCHES):
            arrays = backend.plain_model.collate(documents, labels, epoch=0)
            tensors = to_device(arrays, accelerator.device)
            backend.run(tensors, scale=1e-3, last=number == _MICRO_BATCHES - 1)
        backend.clip_grad_norm(1.0)
        backend.step()
        backend.zero_grad()
    seconds = time.monotonic() - started
    backend.gathered_weights()
    backend.gathered_optimizer_state()
    on_gpu = accelerator.device.type == "cuda"
    pinned = torch.cuda.host_memory_stats() if on_gpu else {}
    return {
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "pinned_bytes": pinned.get("allocated_bytes.peak", 0),
        "device_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "seconds_per_step": seconds,
    }


_HEADER = (
    "| strategy | model | host MiB, plan | resident | of it pinned | GPU MiB, plan | measured "
    "| s a step |\n|---|---|---:|---:|---:|---:|---:|---:|"
)


def _row(row: dict[str, Any]) -> str:
    def mib(num_bytes: int | None) -> str:
        return "-" if num_bytes is None else f"{num_bytes / MIB:,.0f}"

    over = row["resident_bytes"] > row["planned_host_bytes"]
    cells = (
        row["strategy"],
        row["model"],
        mib(row["planned_host_bytes"]),
        f"**{mib(row['resident_bytes'])}**" if over else mib(row["resident_bytes"]),
        mib(row["pinned_bytes"]),
        mib(row["planned_device_bytes"]),
        mib(row["device_bytes"]),
        f"{row['seconds_per_step']:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _write(
    folder: Path, profile: HardwareProfile, rows: list[dict[str, Any]], left_out: list[str]
) -> Path:
    name = "cpu" if profile.gpu is None else profile.gpu.name
    there = f"{platform.machine()} CPU"
    if profile.gpu is not None:
        there = f"{profile.gpu.name}, {profile.gpu.memory_bytes / GIB:.0f} GiB"
    lines = [
        f"# Host memory where ZeRO offloads: {there}",
        "",
        f"`python benchmarks/offload_on_gpu.py`, torch {torch.__version__}, bf16, blocks "
        f"checkpointed, two steps of {_MICRO_BATCHES} micro batches and a gathered checkpoint, one "
        "process. Bold: more than its plan.",
        "",
        _HEADER,
        *map(_row, rows),
        "",
        *(["Left out:", "", *(f"- {line}" for line in left_out), ""] if left_out else []),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y-%m-%d')}-offload-on-{name}.md"
    path.write_text("\n".join(lines), "utf-8")
    path.with_suffix(".json").write_text(json.dumps({"cases": rows}, indent=1) + "\n", "utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
