"""How long a training takes: seconds from operations, bytes and launches, as a range.

A step's matrix products run at a part of the device's peak that published trainings show
(`catalog.gpus`); its other kernels move bytes at the memory's bandwidth; the CPU that launches all
of them may be slower than the GPU; and several GPUs wait for each other's gradients. What was
measured on the machine itself (`plan.calibration`) corrects the sum.
"""

from dataclasses import dataclass

from accel_gpt2.catalog.gpus import GpuSpec
from accel_gpt2.catalog.models import ModelSpec
from accel_gpt2.catalog.optimizers import OPTIMIZERS
from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.plan.calibration import Calibration, Residual
from accel_gpt2.plan.data import DataStatistics
from accel_gpt2.plan.device_speed import UNKNOWN_GPU, Device, device_of
from accel_gpt2.plan.flops import peak_flops_per_second, train_flops_per_token
from accel_gpt2.plan.step_time import TimeTerm, scoring_seconds_per_token, time_of_step
from accel_gpt2.plan.steps import (
    StepPlan,
    num_evaluations,
    num_saves,
    plan_steps,
)
from accel_gpt2.recipe import TrainRecipe

__all__ = ["SecondsRange", "TimePlan", "TimeTerm", "cold_tokens_per_second", "plan_time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondsRange:
    """A duration as well as it is known."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePlan:
    """The time of a whole run, all classes one after another, and of one optimizer step.

    `tokens_per_second` and `mfu` (None where the peak is unknown) are of training steps alone, over
    all processes; tokens are predicted tokens, padding not counted. `num_steps` and `train_tokens`
    are of all classes and epochs. `source` says what the numbers rest on.
    """

    total: SecondsRange
    terms: tuple[TimeTerm, ...]
    step_seconds: SecondsRange
    step_terms: tuple[TimeTerm, ...]
    tokens_per_second: float
    mfu: float | None
    num_steps: int
    train_tokens: int
    source: str


# Around the steps.
_START_SECONDS = 25.0  # processes, torch and transformers imported, a CUDA context: 15 to 40
_MODEL_SECONDS = 3.0  # built, moved, its first step slower
_TOKENIZED_PER_SECOND = 0.34e6  # tokens, one core, once for each data set and vocabulary
_DISK_BYTES_PER_SECOND = 0.4e9  # hashed, written and flushed: a SATA SSD; NVMe is three times it

# How far the truth may lie: published trainings are within 35% of the formula (the test holds it),
# nothing was published of GPT-2 in shards or offloaded, and CPUs differ by a factor.
_COLD_SPREAD = 1.35
_UNPUBLISHED_SPREAD = 2.0
_CPU_SPREAD = 3.0


def plan_time(
    recipe: TrainRecipe,
    model: ModelSpec,
    profile: HardwareProfile,
    strategy: ShardingStrategy,
    data: DataStatistics,
    *,
    calibration: Calibration | None = None,
) -> TimePlan | None:
    """The time of a run; None on a GPU that has no catalog row and was never measured."""
    gpu = profile.gpu
    residual = None
    if calibration is not None:
        residual = calibration.residual(
            "tokens_per_second", gpu=gpu, strategy=strategy.name, recipe=recipe, model=model
        )
    device = _device(recipe, profile)
    if device is None:
        if residual is None:
            return None
        device = UNKNOWN_GPU
    slower, low, high, source = _correction(device, gpu, strategy, residual)

    world_size = 1 if strategy.backend == "none" else max(1, profile.num_gpus)
    steps = plan_steps(recipe, data, world_size)
    step_terms = tuple(
        TimeTerm(name=term.name, seconds=term.seconds * slower, why=term.why)
        for term in time_of_step(recipe, model, device, strategy, profile, data, steps, world_size)
    )
    step_seconds = sum(term.seconds for term in step_terms)
    terms = _run_terms(recipe, model, device, data, steps, step_seconds, slower, world_size)
    total = sum(term.seconds for term in terms)
    num_steps = steps.num_models * steps.num_steps
    tokens_per_second = steps.tokens / step_seconds
    peak = peak_flops_per_second(gpu, recipe.mixed_precision, tf32=recipe.tf32)
    flops = train_flops_per_token(
        n_layer=model.n_layer,
        n_embd=model.n_embd,
        vocab_size=model.vocab_size,
        context_tokens=data.mean_context_tokens,
        frozen_base=recipe.finetuning != "full",
    )
    return TimePlan(
        total=SecondsRange(low=total * low, expected=total, high=total * high),
        terms=terms,
        step_seconds=SecondsRange(
            low=step_seconds * low, expected=step_seconds, high=step_seconds * high
        ),
        step_terms=step_terms,
        tokens_per_second=tokens_per_second,
        mfu=None if peak is None else tokens_per_second * flops / (peak * world_size),
        num_steps=num_steps,
        train_tokens=round(num_steps * steps.tokens),
        source=f"{source}; lengths: {data.source}",
    )


def cold_tokens_per_second(
    recipe: TrainRecipe,
    model: ModelSpec,
    profile: HardwareProfile,
    strategy: ShardingStrategy,
    data: DataStatistics,
) -> float:
    """What the formula alone says, which is what measurements are compared with."""
    device = _device(recipe, profile) or UNKNOWN_GPU
    world_size = 1 if strategy.backend == "none" else max(1, profile.num_gpus)
    steps = plan_steps(recipe, data, world_size)
    terms = time_of_step(recipe, model, device, strategy, profile, data, steps, world_size)
    return steps.tokens / sum(term.seconds for term in terms)


def _device(recipe: TrainRecipe, profile: HardwareProfile) -> Device | None:
    return device_of(
        profile.gpu, recipe.mixed_precision, tf32=recipe.tf32, num_threads=profile.num_threads
    )


def _correction(
    device: Device, gpu: GpuSpec | None, strategy: ShardingStrategy, residual: Residual | None
) -> tuple[float, float, float, str]:
    """What seconds are multiplied by, the range around the result, and what that rests on."""
    if residual is not None:
        return (
            1 / residual.ratio,
            residual.ratio / residual.high,
            residual.ratio / residual.low,
            f"{device.source}, times {1 / residual.ratio:.2f} {residual.source}",
        )
    spread = _COLD_SPREAD if strategy.backend in {"none", "ddp"} else _UNPUBLISHED_SPREAD
    if gpu is None:
        spread = _CPU_SPREAD
    return 1.0, 1 / spread, spread, f"{device.source}, never measured here"


def _run_terms(
    recipe: TrainRecipe,
    model: ModelSpec,
    device: Device,
    data: DataStatistics,
    steps: StepPlan,
    step_seconds: float,
    slower: float,
    world_size: int,
) -> tuple[TimeTerm, ...]:
    models, mean = steps.num_models, data.mean_tokens
    evaluations = num_evaluations(recipe, steps)
    scored = data.num_validation_documents * mean
    scoring_seconds = slower / world_size * scoring_seconds_per_token(recipe, model, device, data)
    tests = 0 if recipe.objective == "unconditional" else data.num_test_documents
    saves = num_saves(recipe, steps.num_steps, steps.steps_per_epoch)
    state = 4 + OPTIMIZERS[recipe.optimizer].state_bytes_per_parameter
    trained = model.num_parameters
    if recipe.finetuning != "full":
        trained = 16 * recipe.lora_rank * model.n_embd * model.n_layer
    written = trained * (state * saves + 4)
    tokens = (data.num_train_documents + data.num_validation_documents + tests) * mean
    found = (
        (
            "training",
            models * steps.num_steps * step_seconds,
            f"{models} x {steps.num_steps:,} steps of {steps.tokens:,.0f} tokens.",
        ),
        (
            "validation",
            models * evaluations * scored * scoring_seconds,
            f"{models} x {evaluations} times {data.num_validation_documents:,} documents of all "
            "classes, forward only, logits in fp32.",
        ),
        (
            "checkpoints",
            models * written / _DISK_BYTES_PER_SECOND,
            f"{models} x {saves} of {trained * state / 1e9:.2f} GB and a model each, at "
            f"{_DISK_BYTES_PER_SECOND / 1e9:.1f} GB/s.",
        ),
        (
            "start",
            _START_SECONDS + models * _MODEL_SECONDS + tokens / _TOKENIZED_PER_SECOND,
            f"Libraries, {models} model(s) built, and {tokens / 1e6:.1f}M tokens made at "
            f"{_TOKENIZED_PER_SECOND / 1e6:.2f}M a second, the first time.",
        ),
        (
            "test scoring",
            models * tests * mean * scoring_seconds,
            f"{tests:,} test documents under {models} model(s): `accel-gpt2 evaluate`.",
        ),
    )
    return tuple(TimeTerm(name=n, seconds=s, why=why) for n, s, why in found if s > 0)
