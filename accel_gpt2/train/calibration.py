"""What a training measured, written beside what was predicted for it, for the plans to come."""

import contextlib
import dataclasses
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from accel_gpt2.catalog.gpus import GpuSpec
from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.data.cache import cache_directory
from accel_gpt2.durable import write_text
from accel_gpt2.plan.calibration import CALIBRATION_FILE, CalibrationRecord, device_name
from accel_gpt2.plan.data import length_statistics
from accel_gpt2.plan.memory import covers, plan_memory
from accel_gpt2.plan.throughput import cold_tokens_per_second
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.objective import TrainedModel
from accel_gpt2.train.run_log import append_json_line, cut_unfinished_line
from accel_gpt2.train.throughput import StepTimer

# Fewer steps than this are mostly noise.
MIN_STEPS = 20

# The file is cut to its newest half when it has more lines than this.
_MOST_RECORDS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedHere:
    """The machine that a training ran on, in the words of a calibration record."""

    gpu: GpuSpec | None
    device: torch.device
    num_processes: int

    @property
    def profile(self) -> HardwareProfile:
        """As a plan takes it; what connects several GPUs is not looked up."""
        return HardwareProfile(
            name="here",
            gpu=self.gpu,
            num_gpus=0 if self.device.type == "cpu" else self.num_processes,
            interconnect="none" if self.num_processes == 1 else "pcie",
            host_memory_bytes=0,
            num_threads=torch.get_num_threads(),
        )


def record_training(
    model: TrainedModel,
    recipe: TrainRecipe,
    lengths: NDArray[Any],
    timer: StepTimer,
    here: TrainedHere,
) -> None:
    """Append a record, where there is something to record; never raises.

    Args:
        lengths: of the training documents, BOS and EOS included.
    """
    # A training that came to its end must not fail for the sake of later plans.
    with contextlib.suppress(Exception):
        if timer.num_steps >= MIN_STEPS:
            record = measured_record(model, recipe, lengths, timer, here)
            if record is not None:
                append_record(record)


def measured_record(
    model: TrainedModel,
    recipe: TrainRecipe,
    lengths: NDArray[Any],
    timer: StepTimer,
    here: TrainedHere,
) -> CalibrationRecord | None:
    """Predicted and measured side by side; None for a training that no formula covers."""
    if not isinstance(model, LanguageModel):
        return None
    spec = model_spec_of(model, recipe)
    if spec is None or not covers(recipe, spec):
        return None
    if here.device.type == "cuda" and here.gpu is None:
        here = dataclasses.replace(here, gpu=unknown_gpu(here.device))
    data = length_statistics(lengths.tolist(), source="this training's documents")
    strategy = STRATEGIES["single" if here.num_processes == 1 else "ddp"]
    memory = plan_memory(recipe, spec, here.profile, strategy, longest_tokens=data.longest_tokens)
    on_gpu = here.device.type == "cuda"
    return CalibrationRecord(
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        device=device_name(here.gpu),
        driver=_driver(here.device),
        torch=torch.__version__,
        strategy=strategy.name,
        num_processes=here.num_processes,
        model=recipe.model,
        n_layer=spec.n_layer,
        n_embd=spec.n_embd,
        vocab_size=spec.vocab_size,
        mixed_precision=recipe.mixed_precision,
        finetuning=recipe.finetuning,
        optimizer=recipe.optimizer,
        gradient_checkpointing=recipe.gradient_checkpointing,
        micro_batch_tokens=recipe.micro_batch_tokens,
        context_tokens=data.mean_context_tokens,
        predicted_allocated_bytes=memory.allocated_bytes,
        measured_allocated_bytes=(torch.cuda.max_memory_allocated(here.device) if on_gpu else None),
        predicted_reserved_bytes=memory.reserved.expected,
        measured_reserved_bytes=torch.cuda.max_memory_reserved(here.device) if on_gpu else None,
        predicted_tokens_per_second=cold_tokens_per_second(
            recipe, spec, here.profile, strategy, data
        ),
        measured_tokens_per_second=timer.tokens_per_second,
    )


def model_spec_of(model: LanguageModel, recipe: TrainRecipe) -> ModelSpec | None:
    """The row that the model would have in the catalog; None for what is no GPT-2."""
    config = model.transformers_model.config
    if config.model_type != "gpt2":
        return None
    return ModelSpec(
        name=recipe.model,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_positions=config.n_positions,
        vocab_size=config.vocab_size,
        hub_id=None,
        source="the model's own config",
    )


def unknown_gpu(device: torch.device) -> GpuSpec:
    """A GPU without a catalog row, as `cli.hardware` describes it."""
    properties = torch.cuda.get_device_properties(device)
    return GpuSpec(
        name="unknown",
        display_name=properties.name,
        match=(properties.name,),
        memory_bytes=properties.total_memory,
        peak_flops={},
        bandwidth_bytes_per_second=None,
        tdp_watts=None,
        source="detected on this machine; no catalog row",
    )


def _driver(device: torch.device) -> str:
    """What a speed depends on beside the device itself: an upgrade makes older records void."""
    if device.type != "cuda":
        name = _first_in("/proc/cpuinfo", r"model name\s*: (.+)") or platform.processor()
        return f"{name}, {torch.get_num_threads()} threads"
    # On Windows the driver's version is not in a file.
    version = _first_in("/proc/driver/nvidia/version", r"\b(\d{3,}\.[\d.]+)\b")
    return version or f"CUDA {torch.version.cuda}"


def _first_in(path: str, pattern: str) -> str | None:
    with contextlib.suppress(OSError):
        if found := re.search(pattern, Path(path).read_text(encoding="utf-8", errors="replace")):
            return found[1].strip()
    return None


def append_record(record: CalibrationRecord) -> Path:
    """Add a line to the calibration file, which is made where there is none; the path.

    Raises:
        OSError: when it cannot be written.
    """
    path = cache_directory() / CALIBRATION_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_unfinished_line(path)
    append_json_line(path, dataclasses.asdict(record))
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if len(lines) > _MOST_RECORDS:
        write_text(path, "".join(lines[-_MOST_RECORDS // 2 :]))
    return path
