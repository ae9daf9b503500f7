"""What plans say of memory and speed against what a GPU measures.

    python benchmarks/memory_on_gpu.py [--seconds 540] [--output docs/benchmarks]
    python benchmarks/memory_on_gpu.py --device cpu --sizes tiny      # a rehearsal without a GPU

A table of training steps, the most telling ones first, each with random weights, its own optimizer
and full batches: predicted and measured peak of allocated memory, reserved memory, what the driver
shows as used, and tokens per second. Where the plan says that a step fits a 16 GB card, it may use
no more than such a card has. It needs no network and stops in time: what is left out is said.
Where the package is not installed, it runs from the repository with PYTHONPATH=. and, beside torch,
transformers, accelerate and peft, the wheels that gpu_options.py names; and bitsandbytes, without
which 8-bit states and 4-bit bases are left out.

Exit code 1 when a peak is predicted more than 3% wrong, or more than 1% too low, or a step that
should fit 16 GB did not.
"""

import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_options import gpu_options, is_there
from results import say

from accel_gpt2.catalog.gpus import find_gpu
from accel_gpt2.catalog.models import MODELS, ModelSpec
from accel_gpt2.catalog.profiles import PROFILES, HardwareProfile
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.plan.data import length_statistics
from accel_gpt2.plan.memory import MemoryPlan, plan_memory
from accel_gpt2.plan.throughput import cold_tokens_per_second
from accel_gpt2.recipe import Finetuning, MixedPrecision, Optimizer, Quantization, TrainRecipe
from accel_gpt2.trace.measured import peak_allocated_bytes
from accel_gpt2.trace.step import StockLoss, autocast, training_step
from accel_gpt2.train.calibration import unknown_gpu
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import to_device
from accel_gpt2.train.optim import BITSANDBYTES, build_optimizer
from accel_gpt2.train.released import GradientReleaser
from accel_gpt2.units import GIB, MIB

# The bars of `plan`: relative error of the peak, and how much of it may be too low.
LARGEST_ERROR = 0.03
LARGEST_UNDERESTIMATE = 0.01

_WARM_UP_STEPS, _TIMED_STEPS = 2, 2
_SMALL_CARD = PROFILES["rtx4070ti"]
_SINGLE = STRATEGIES["single"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training step: micro batches of `documents` of `length` predicted tokens each."""

    model: str
    precision: MixedPrecision
    documents: int
    length: int
    finetuning: Finetuning = "full"
    optimizer: Optimizer = "adamw"
    quantization: Quantization = "nf4"
    use_dora: bool = False
    checkpointing: bool = False
    checkpointed_layers: int | None = None
    released: bool = False
    accumulation: int = 1
    packed: bool = False
    dropout: float = 0.1
    stock: bool = False

    @property
    def label(self) -> str:
        """One line for a table."""
        parts = [
            self.model,
            f"{self.documents}x{self.length}",
            self.precision.replace("no", "fp32"),
            *([self.finetuning] if self.finetuning != "full" else []),
            *([self.quantization] if self.quantization != "nf4" else []),
            *(["DoRA"] if self.use_dora else []),
            *([self.optimizer] if self.optimizer != "adamw" else []),
            *(["checkpointing"] if self.checkpointing else []),
            *(
                [f"of {self.checkpointed_layers} blocks"]
                if self.checkpointed_layers is not None
                else []
            ),
            *(["released gradients"] if self.released else []),
            *([f"{self.accumulation} micro batches"] if self.accumulation > 1 else []),
            *(["no dropout"] if self.dropout == 0 else []),
            *(["packed rows"] if self.packed else []),
            *(["stock loss"] if self.stock else []),
        ]
        return ", ".join(parts)

    @property
    def recipe(self) -> TrainRecipe:
        """What `plan` and the training get."""
        return TrainRecipe(
            model=self.model,
            init="scratch",
            max_length=self.length + 1,
            micro_batch_tokens=self.documents * self.length,
            global_batch_tokens=None,
            global_batch_size=self.documents * self.accumulation,
            mixed_precision=self.precision,
            finetuning=self.finetuning,
            optimizer=self.optimizer,
            quantization=self.quantization,
            use_dora=self.use_dora,
            gradient_checkpointing=self.checkpointing,
            checkpointed_layers=self.checkpointed_layers,
            release_gradients=self.released,
            max_grad_norm=0.0 if self.released else 1.0,
            packing="on" if self.packed else "off",
            dropout=self.dropout,
            fused_gelu=not self.stock,
        )


def _case(model: str, precision: MixedPrecision, shape: str, **options: Any) -> Case:
    documents, length = (int(number) for number in shape.split("x"))
    return Case(model=model, precision=precision, documents=documents, length=length, **options)


_LARGE: dict[str, Any] = {"checkpointing": True}
_EIGHT: dict[str, Any] = {"optimizer": "adamw_8bit"}
_FACTORED: dict[str, Any] = {"optimizer": "adafactor"}
_LORA: dict[str, Any] = {"finetuning": "lora"}
_QLORA: dict[str, Any] = {"finetuning": "qlora"}
_STOCK: dict[str, Any] = {"stock": True}
_RELEASED: dict[str, Any] = {"released": True}
_PACKED: dict[str, Any] = {"packed": True}
_PAGED: dict[str, Any] = {"optimizer": "adamw_8bit_paged"}
_MEDIUM, _LARGEST = "gpt2-medium", "gpt2-xl"

# The recommended recipes first, then one change at a time, then the rest of the sizes.
CASES = (
    _case("gpt2", "bf16", "8x1024"),
    _case("gpt2", "bf16", "8x1024", **_STOCK),
    _case("gpt2", "bf16", "8x1024", **_PACKED),
    _case("gpt2", "bf16", "8x1024", **_PACKED, dropout=0.0),
    _case("gpt2", "no", "4x1024"),
    _case("gpt2", "fp16", "8x1024"),
    _case("gpt2", "pure_bf16", "8x1024"),
    _case("gpt2", "bf16", "8x1024", **_LARGE),
    _case(_MEDIUM, "bf16", "4x1024", **_LARGE),
    _case("gpt2-large", "bf16", "1x1024", **_LARGE),
    _case(_LARGEST, "pure_bf16", "1x1024", **_LARGE, **_EIGHT),
    _case(_LARGEST, "bf16", "1x1024", **_LARGE, **_LORA),
    _case(_LARGEST, "bf16", "1x1024", **_LARGE, **_QLORA),
    # What the plan recommends on 16 GB: as few blocks checkpointed as fit.
    _case(_LARGEST, "pure_bf16", "2x1024", **_LARGE, **_EIGHT, checkpointed_layers=3),
    _case("gpt2-large", "bf16", "2x1024", **_LARGE, checkpointed_layers=34),
    _case(_LARGEST, "pure_bf16", "1x1024", **_LARGE, **_EIGHT, **_RELEASED),
    _case(_LARGEST, "pure_bf16", "1x1024", **_LARGE, **_PAGED),
    _case(_LARGEST, "bf16", "1x1024", **_LARGE, **_LORA, use_dora=True),
    _case(_LARGEST, "bf16", "1x1024", **_LARGE, **_QLORA, quantization="int8"),
    _case("gpt2-large", "bf16", "1x1024", **_LARGE, **_PACKED),
    _case(_LARGEST, "pure_bf16", "1x1024", **_EIGHT, **_PACKED),
    _case("gpt2", "bf16", "64x128"),
    _case("gpt2", "bf16", "1x1024"),
    _case("gpt2", "bf16", "8x512"),
    _case("gpt2", "bf16", "4x1024", accumulation=2),
    _case("gpt2", "bf16", "8x1024", **_EIGHT),
    _case("gpt2", "bf16", "8x1024", **_FACTORED),
    _case("gpt2", "bf16", "8x1024", **_LORA),
    _case("gpt2", "bf16", "8x1024", **_QLORA),
    _case("gpt2", "no", "8x512", **_LARGE),
    _case("gpt2", "no", "4x1024", **_STOCK),
    _case("gpt2", "bf16", "8x1024", dropout=0.0),
    _case("gpt2", "pure_bf16", "8x512", **_EIGHT),
    _case("gpt2", "fp16", "64x128", **_LORA),
    _case(_MEDIUM, "bf16", "4x1024"),
    _case(_MEDIUM, "bf16", "2x1024", **_STOCK),
    _case(_MEDIUM, "no", "1x1024"),
    _case(_MEDIUM, "pure_bf16", "8x512"),
    _case(_MEDIUM, "bf16", "64x128", **_EIGHT),
    _case(_MEDIUM, "fp16", "8x512", **_LARGE, accumulation=2),
    _case(_MEDIUM, "bf16", "8x512", **_LORA),
    _case(_MEDIUM, "bf16", "8x512", **_QLORA),
    _case(_MEDIUM, "bf16", "1x1024", **_FACTORED),
    _case("gpt2-large", "bf16", "2x1024"),
    _case("gpt2-large", "bf16", "2x1024", **_LARGE, **_STOCK),
    _case("gpt2-large", "bf16", "32x128", **_LARGE, **_EIGHT),
    _case("gpt2-large", "no", "1x1024", **_LARGE),
    _case("gpt2-large", "pure_bf16", "1x1024", **_LARGE, **_EIGHT),
    _case("gpt2-large", "pure_bf16", "4x512"),
    _case("gpt2-large", "bf16", "8x512", **_LARGE, **_LORA),
    _case("gpt2-large", "bf16", "4x512", **_QLORA),
    _case("gpt2-large", "fp16", "1x1024", **_FACTORED),
    _case(_LARGEST, "bf16", "1x1024", **_LARGE),
    _case(_LARGEST, "bf16", "1x1024", **_LARGE, **_EIGHT),
    _case(_LARGEST, "pure_bf16", "1x1024", **_LARGE, **_FACTORED),
    _case(_LARGEST, "pure_bf16", "8x512", **_LARGE),
    _case(_LARGEST, "fp16", "2x1024", **_LARGE, **_LORA),
    _case(_LARGEST, "bf16", "16x128", **_QLORA),
    _case(_LARGEST, "no", "1x512", **_LARGE),
)

# In fp32, and without bitsandbytes, which on a CPU makes fp32 copies that its GPU kernels do not.
TINY_CASES = tuple(
    _case("gpt2-tiny", "no", shape, **options)
    for shape, options in (
        ("4x64", {}),
        ("4x64", _STOCK),
        ("1x128", {"dropout": 0.0}),
        ("4x64", _LARGE),
        ("4x64", {"accumulation": 2}),
        ("4x64", _FACTORED),
        ("4x64", _LORA),
        ("4x64", {**_LARGE, "checkpointed_layers": 1}),
        ("4x64", {**_LORA, "use_dora": True}),
        ("4x64", _RELEASED),
        ("4x64", _PACKED),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A case's predictions beside what was measured; None for what this device does not tell."""

    label: str
    phase: str
    predicted_allocated_bytes: int
    measured_allocated_bytes: int | None  # None: it did not fit
    predicted_reserved_bytes: int
    measured_reserved_bytes: int | None
    predicted_device_bytes: int
    measured_device_bytes: int | None
    predicted_tokens_per_second: float
    measured_tokens_per_second: float | None
    within_16_gb: bool
    seconds: float

    @property
    def error(self) -> float | None:
        """Of the predicted peak, relative; positive where it is too high."""
        if self.measured_allocated_bytes is None:
            return None
        return self.predicted_allocated_bytes / self.measured_allocated_bytes - 1

    @property
    def misses(self) -> bool:
        """Whether a bar is missed."""
        return self.error is None or not -LARGEST_UNDERESTIMATE <= self.error <= LARGEST_ERROR


def main() -> int:
    """Measure, write the table, and say whether the bars are held."""
    parser = gpu_options(__doc__, seconds=540.0)
    options = parser.parse_args()
    # As `accel-gpt2 train` has it, by its newer name and its older one; read at the first tensor.
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.setdefault(name, "expandable_segments:True")
    if not is_there(options.device):
        return 2
    device = torch.device(options.device)
    profile = _profile(device)
    measured: list[Measured] = []
    left_out: list[str] = []
    started = time.monotonic()
    slowest = 0.0
    for case in CASES if options.sizes == "all" else TINY_CASES:
        seconds_left = options.seconds - (time.monotonic() - started)
        if (reason := _reason_against(case, profile, seconds_left, slowest)) is not None:
            left_out.append(f"{case.label}: {reason}")
            say(f"left out: {left_out[-1]}")
            continue
        result = _measure(case, device, profile)
        slowest = max(slowest, result.seconds)
        measured.append(result)
        say(_row(result))
    if not measured:
        say("Nothing could be measured.")
        return 1
    path = _write(options.output, device, profile, measured, left_out)
    say(f"wrote {path}")
    return 1 if any(result.misses for result in measured) else 0


def _profile(device: torch.device) -> HardwareProfile:
    if device.type == "cpu":
        return PROFILES["cpu"]
    properties = torch.cuda.get_device_properties(device)
    gpu = find_gpu(properties.name, properties.total_memory) or unknown_gpu(device)
    return HardwareProfile(
        name="here", gpu=gpu, num_gpus=1, interconnect="none", host_memory_bytes=0
    )


def _reason_against(
    case: Case, profile: HardwareProfile, seconds_left: float, slowest: float
) -> str | None:
    needs_bitsandbytes = case.optimizer in BITSANDBYTES or case.finetuning == "qlora"
    if needs_bitsandbytes and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if _plan(case, profile).verdict == "does not fit":
        return "does not fit this device"
    # A case is seldom slower than the slowest before it, and all of them are to end in time.
    return "no time left" if seconds_left < max(20.0, 1.5 * slowest) else None


def _plan(case: Case, profile: HardwareProfile) -> MemoryPlan:
    return plan_memory(
        case.recipe,
        MODELS[case.model],
        profile,
        _SINGLE,
        longest_tokens=case.length + 1,
        stock_loss=case.stock,
    )


def _measure(case: Case, device: torch.device, profile: HardwareProfile) -> Measured:
    started = time.monotonic()
    plan = _plan(case, profile)
    on_gpu = device.type == "cuda"
    small = _plan(case, _SMALL_CARD)
    capped = on_gpu and small.verdict == "fits"
    allocated: int | None = None
    tokens_per_second: float | None = None
    reserved: int | None = None
    used: int | None = None
    _empty(device)
    with _cap(small, device) if capped else contextlib.nullcontext():
        try:
            allocated, tokens_per_second = _run(case, device)
            if on_gpu:
                reserved = torch.cuda.max_memory_reserved(device)
                free, total = torch.cuda.mem_get_info(device)
                used = total - free
        except torch.OutOfMemoryError as error:
            say(f"out of memory: {str(error).splitlines()[0]}")
    _empty(device)
    lengths = [case.length + 1] * case.documents * case.accumulation
    return Measured(
        label=case.label,
        phase=plan.peak.name,
        predicted_allocated_bytes=plan.allocated_bytes,
        measured_allocated_bytes=allocated,
        predicted_reserved_bytes=plan.reserved.expected,
        measured_reserved_bytes=reserved,
        predicted_device_bytes=plan.device.expected,
        measured_device_bytes=used,
        predicted_tokens_per_second=cold_tokens_per_second(
            case.recipe,
            MODELS[case.model],
            profile,
            _SINGLE,
            length_statistics(lengths, source="this table"),
        ),
        measured_tokens_per_second=tokens_per_second,
        within_16_gb=capped,
        seconds=time.monotonic() - started,
    )


def _run(case: Case, device: torch.device) -> tuple[int, float]:
    """The peak of two steps and an evaluation, and the speed of the steps after them."""
    with tempfile.TemporaryDirectory() as folder:
        model = _model(case, device, Path(folder))
    recipe = dataclasses.replace(case.recipe, init="pretrained")  # nothing below looks at weights
    optimizer = build_optimizer(model, recipe)
    releaser = GradientReleaser(optimizer) if case.released else None
    trained = StockLoss(model.model) if case.stock else model
    scaler = None
    if case.precision == "fp16":
        # Nothing overflows at this scale: a skipped step leaves the optimizer without state.
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    random = np.random.default_rng(0)
    vocab_size = MODELS[case.model].vocab_size
    documents = [random.integers(0, vocab_size, case.length + 1) for _ in range(case.documents)]

    def micro_batch() -> tuple[torch.Tensor, ...]:
        labels = np.zeros(len(documents), dtype=np.int64)
        return to_device(model.collate(documents, labels, epoch=0), device)

    def step() -> None:
        norm = training_step(
            trained,
            optimizer,
            [micro_batch] * case.accumulation,
            recipe,
            num_targets=case.documents * case.length * case.accumulation,
            scaler=scaler,
            releaser=releaser,
        )
        float(norm)  # waits for the device, as the loop does

    def work() -> None:
        model.train()
        for _ in range(_WARM_UP_STEPS):
            step()
        if not case.stock:  # an evaluation is ours
            model.eval()
            with autocast(recipe, device):
                model.score(documents, device)

    held = 0
    if device.type == "cpu":
        held = sum(x.numel() * x.itemsize for x in (*model.parameters(), *model.buffers()))
    peak = held + peak_allocated_bytes(device, work)
    model.train()
    seconds = []
    for _ in range(_TIMED_STEPS):
        started = time.monotonic()
        step()
        seconds.append(time.monotonic() - started)
    tokens = case.documents * case.length * case.accumulation
    return peak, tokens / min(seconds)


def _model(case: Case, device: torch.device, folder: Path) -> LanguageModel:
    spec = MODELS[case.model]
    recipe = case.recipe
    if case.finetuning == "qlora":
        # It is quantised while it is read, so there must be something to read.
        recipe = dataclasses.replace(recipe, model=_random_weights(spec, device, folder))
        recipe = dataclasses.replace(recipe, init="pretrained")
    with device:  # random numbers are drawn there: a CPU takes a minute for the largest
        model = build_model(recipe, vocab_size=spec.vocab_size, eos_token_id=spec.vocab_size - 1)
    assert isinstance(model, LanguageModel)
    model.pack_rows(recipe, device)
    return model.to(device)


def _random_weights(spec: ModelSpec, device: torch.device, folder: Path) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=spec.n_layer,
        n_head=spec.n_head,
        n_embd=spec.n_embd,
        n_positions=spec.n_positions,
        vocab_size=spec.vocab_size,
    )
    with device:
        GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    _empty(device)
    return str(folder)


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # they would be the next case's too
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextlib.contextmanager
def _cap(plan: MemoryPlan, device: torch.device) -> Iterator[None]:
    """What torch may take on the card that the plan is for: all but contexts and libraries."""
    assert plan.usable_bytes is not None
    besides = plan.device.expected - plan.reserved.expected
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((plan.usable_bytes - besides) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


_HEADER = (
    "| step | fullest at | allocated MiB, plan | measured | error | reserved MiB, plan | measured "
    "| device MiB, plan | measured | tokens/s, plan | measured | 16 GB |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|"
)


def _row(result: Measured) -> str:
    def mib(num_bytes: int | None) -> str:
        return "-" if num_bytes is None else f"{num_bytes / MIB:,.0f}"

    error = "did not fit" if result.error is None else f"{100 * result.error:+.2f}%"
    speed = result.measured_tokens_per_second
    cells = (
        result.label,
        result.phase,
        mib(result.predicted_allocated_bytes),
        mib(result.measured_allocated_bytes),
        f"**{error}**" if result.misses else error,
        mib(result.predicted_reserved_bytes),
        mib(result.measured_reserved_bytes),
        mib(result.predicted_device_bytes),
        mib(result.measured_device_bytes),
        f"{result.predicted_tokens_per_second:,.0f}",
        "-" if speed is None else f"{speed:,.0f}",
        "held" if result.within_16_gb and result.error is not None else "",
    )
    return f"| {' | '.join(cells)} |"


def _write(
    folder: Path,
    device: torch.device,
    profile: HardwareProfile,
    measured: list[Measured],
    left_out: list[str],
) -> Path:
    name = "cpu" if profile.gpu is None else profile.gpu.name
    path = folder / f"{time.strftime('%Y-%m-%d')}-memory-on-{name}.md"
    folder.mkdir(parents=True, exist_ok=True)
    errors = [result.error for result in measured if result.error is not None]
    missed = [result.label for result in measured if result.misses]
    summary = {
        "device": _device_name(device),
        "torch": torch.__version__,
        "num_cases": len(measured),
        "mean_absolute_error": statistics.fmean(map(abs, errors)) if errors else None,
        "largest_overestimate": max(errors, default=None),
        "largest_underestimate": min(errors, default=None),
        "missed": missed,
        "left_out": left_out,
    }
    rows = [{**dataclasses.asdict(result), "error": result.error} for result in measured]
    path.with_suffix(".json").write_text(
        json.dumps({"summary": summary, "cases": rows}, indent=1) + "\n", "utf-8"
    )
    bars = (
        f"Bars: at most {LARGEST_ERROR:.0%} wrong and {LARGEST_UNDERESTIMATE:.0%} too low. "
        f"{len(missed)} of {len(measured)} missed."
    )
    spread = (
        f"Mean {100 * statistics.fmean(map(abs, errors)):.2f}%, from {100 * min(errors):+.2f}% to "
        f"{100 * max(errors):+.2f}%."
        if errors
        else "Nothing was measured."
    )
    lines = [
        f"# Predicted and measured memory: {_device_name(device)}",
        "",
        f"`python benchmarks/memory_on_gpu.py`, torch {torch.__version__}, {platform.platform()}. "
        "Random weights, full batches, "
        f"{_WARM_UP_STEPS} steps and an evaluation; speed from {_TIMED_STEPS} more steps.",
        "",
        f"{bars} {spread}",
        "",
        _HEADER,
        *map(_row, measured),
        "",
        *(["Left out:", "", *(f"- {line}" for line in left_out), ""] if left_out else []),
    ]
    path.write_text("\n".join(lines), "utf-8")
    say(f"{bars} {spread}")
    return path


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()} CPU"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
