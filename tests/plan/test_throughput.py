"""Time plans: against published trainings, and as arithmetic that must hang together."""

import dataclasses
import statistics

import pytest

from accel_gpt2.catalog.gpus import GPUS, GpuSpec
from accel_gpt2.catalog.models import MODELS, ModelSpec
from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.plan.calibration import Calibration
from accel_gpt2.plan.data import DataStatistics, dataset_statistics
from accel_gpt2.plan.device_speed import device_of, matmul_seconds
from accel_gpt2.plan.flops import forward_flops
from accel_gpt2.plan.step_time import Kernels, kernel_seconds
from accel_gpt2.plan.throughput import TimePlan, plan_time
from accel_gpt2.recipe import Layer, TrainRecipe
from accel_gpt2.recipe.resolving import resolve

from .records import record

# How the published programs compute what is not a matrix product. llm.c: bf16 weights and
# activations, residuals added inside LayerNorm, softmax and its gradient in one pass over bf16
# logits. llm-foundry: bf16 under FSDP, torch's own loss. nanoGPT: autocast from fp32 weights,
# torch 2.0's compiler fuses GELU, the loss is in fp32.
LLM_C = Kernels(layer_bytes=96, head_bytes=4)
LLM_FOUNDRY = Kernels(layer_bytes=120, head_bytes=36)
NANOGPT = Kernels(layer_bytes=190, head_bytes=48)

# GPU, n_layer, n_embd, vocabulary, sequence length, kernels, tokens/s per GPU; from the README and
# discussions of karpathy/llm.c (#481, #580 and #677), karpathy/nanoGPT's README, and
# mosaicml/llm-foundry's scripts/train/benchmarking/README.md.
PUBLISHED = [
    ("a100-80", 12, 768, 50304, 1024, LLM_C, 218e3),
    ("a100-80", 24, 1024, 50304, 1024, LLM_C, 79.9e3),
    ("a100-80", 36, 1280, 50304, 1024, LLM_C, 38.6e3),
    ("h100-80", 48, 1600, 50304, 1024, LLM_C, 46.8e3),
    ("h100-80", 12, 768, 50304, 1024, LLM_C, 475e3),
    ("rtx4090", 12, 768, 50304, 1024, LLM_C, 110e3),
    ("a100-80", 24, 1024, 50368, 2048, LLM_FOUNDRY, 64.8e3),
    ("a100-80", 24, 2048, 50368, 2048, LLM_FOUNDRY, 22.1e3),
    ("a100-40", 12, 768, 50304, 1024, NANOGPT, 109e3),
]


def _published_rate(gpu: str, shape: tuple[int, int, int], length: int, kernels: Kernels) -> float:
    n_layer, n_embd, vocab_size = shape
    device = device_of(GPUS[gpu], "bf16")
    assert device is not None
    model = dataclasses.replace(
        MODELS["gpt2"], n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size
    )
    flops = forward_flops(
        n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size, context_tokens=length
    )
    products = 3 * (flops.blocks + flops.attention + flops.head)
    return 1 / (
        matmul_seconds(1, products, n_embd, device) + kernel_seconds(1, model, kernels, device)
    )


@pytest.mark.parametrize(
    ("gpu", "mixed_precision", "tf32", "tflops"),
    [
        ("a100-40", "no", False, 0.8 * 19.5),
        ("a100-40", "no", True, 0.7 * 156),
        ("a100-40", "bf16", True, 0.7 * 312),
        ("rtx4070ti", "no", True, 0.8 * 44.1),  # its tensor cores are no faster on the sheet
        ("t4", "no", True, 0.8 * 8.1),  # has none
    ],
)
def test_fp32_products_in_tf32(gpu: str, mixed_precision: str, tf32: bool, tflops: float) -> None:
    """A training's products have the peak of TF32 where that is more; scores stay fp32."""
    device = device_of(GPUS[gpu], mixed_precision, tf32=tf32)
    plain = device_of(GPUS[gpu], mixed_precision)
    assert device is not None
    assert plain is not None
    assert device.matmul_flops == pytest.approx(tflops * 1e12)
    assert device.fp32_matmul_flops == plain.fp32_matmul_flops


def test_scores_are_multiplied_by_halves_where_that_is_faster() -> None:
    """A third of fp16's rate in place of fp32's, where that is more."""
    for name, gpu in GPUS.items():
        device = device_of(gpu, "fp16")
        assert device is not None
        by_halves = name.startswith(("t4", "v100", "a100", "h100", "h200"))
        assert gpu.multiplies_by_halves == by_halves
        gain = device.scoring_head_flops / device.fp32_matmul_flops
        assert 1.5 < gain < 5 if by_halves else gain == 1


def test_a_cpu_is_as_fast_as_it_has_threads() -> None:
    """Eight cores are not eight times one, and no fewer threads are faster."""
    alone, eight = (device_of(None, "no", num_threads=n) for n in (1, 8))
    assert alone is not None
    assert eight is not None
    assert 4 < eight.matmul_flops / alone.matmul_flops < 8
    assert 1 < eight.bytes_per_second / alone.bytes_per_second < 8


def test_published_trainings_are_within_the_stated_error() -> None:
    """Nine published rates on four GPUs: each within 35% of the formula, 10% on average."""
    errors = [
        abs(_published_rate(gpu, (n_layer, n_embd, vocab), length, kernels) / rate - 1)
        for gpu, n_layer, n_embd, vocab, length, kernels, rate in PUBLISHED
    ]
    assert len(errors) == 9
    assert max(errors) < 0.35, errors
    assert statistics.mean(errors) < 0.10, errors


def _recipe(**values: object) -> TrainRecipe:
    given = {"dataset": "ag_news", "mixed_precision": "bf16", **values}
    return resolve([Layer(origin="test", values=given)]).recipe


def _data(recipe: TrainRecipe) -> DataStatistics:
    data = dataset_statistics(recipe)
    assert data is not None
    return data


def _time(
    recipe: TrainRecipe,
    profile: str = "rtx4070ti",
    strategy: str = "single",
    model: ModelSpec | None = None,
    calibration: Calibration | None = None,
) -> TimePlan:
    found = plan_time(
        recipe,
        model or MODELS[recipe.model],
        PROFILES[profile],
        STRATEGIES[strategy],
        _data(recipe),
        calibration=calibration,
    )
    assert found is not None
    return found


def test_terms_are_the_whole() -> None:
    """Terms add up to the step and to the run, each has a sentence, and ranges hold them."""
    for profile in PROFILES:
        plan = _time(_recipe(**PROFILES[profile].recipe_defaults), profile)
        assert sum(term.seconds for term in plan.terms) == pytest.approx(plan.total.expected)
        assert sum(t.seconds for t in plan.step_terms) == pytest.approx(plan.step_seconds.expected)
        assert all(term.seconds > 0 and term.why for term in (*plan.terms, *plan.step_terms))
        assert plan.total.low < plan.total.expected < plan.total.high
        training = next(term for term in plan.terms if term.name == "training")
        assert training.seconds == pytest.approx(plan.num_steps * plan.step_seconds.expected)
        assert plan.tokens_per_second * training.seconds == pytest.approx(plan.train_tokens, 1e-6)


def test_every_choice_changes_time_in_its_direction() -> None:
    """What computes more takes longer: checkpointing, dropout, a larger model, a longer context;
    what computes less is faster: an adapter, fewer epochs, a faster card."""
    plain = _time(_recipe())
    assert _time(_recipe(gradient_checkpointing=True)).total.expected > plain.total.expected
    assert _time(_recipe(dropout=0.0)).total.expected < plain.total.expected
    assert _time(_recipe(fused_gelu=False)).total.expected > plain.total.expected
    assert _time(_recipe(model="gpt2-medium")).total.expected > 2 * plain.total.expected
    assert _time(_recipe(finetuning="lora")).total.expected < plain.total.expected
    assert _time(_recipe(epochs=1.0)).total.expected < plain.total.expected / 2
    assert _time(_recipe(mixed_precision="no")).total.expected > plain.total.expected
    assert _time(_recipe(), "h100-80").total.expected < plain.total.expected / 2
    small = _time(_recipe(global_batch_tokens=256))
    assert small.tokens_per_second < 0.7 * plain.tokens_per_second  # the optimizer and launches


def test_two_cards_without_nvlink_are_less_than_twice_as_fast() -> None:
    """DDP over PCIe gains 1.3 to 1.8 times; ZeRO-3's gathers and offloading cost more than DDP."""
    one = _time(_recipe(), "2x-rtx4070ti", "single").step_seconds.expected
    two = _time(_recipe(), "2x-rtx4070ti", "ddp").step_seconds.expected
    offloaded = _time(_recipe(), "2x-rtx4070ti", "zero3_offload").step_seconds.expected
    assert 1.3 < one / two < 1.8
    assert offloaded > two


def test_evaluations_are_of_all_classes_under_each_model() -> None:
    """Validation time grows with the number of evaluations, and test scoring is its own term."""
    terms = {t.name: t.seconds for t in _time(_recipe()).terms}
    often = {t.name: t.seconds for t in _time(_recipe(evaluate_every_steps=20)).terms}
    assert often["validation"] > 5 * terms["validation"]
    assert often["test scoring"] == terms["test scoring"] > 0
    base = {t.name for t in _time(_recipe(objective="unconditional")).terms}
    assert "test scoring" not in base


def test_mfu_is_of_the_sheets_peak() -> None:
    """MFU is tokens/s times 6 N and attention over the peak, and unknown where the peak is."""
    plan = _time(_recipe(max_length=1024, dropout=0.0), "a100-80")
    assert plan.mfu == pytest.approx(
        plan.tokens_per_second * 6 * 123_532_032 / 312e12, rel=0.02
    )  # matrices of GPT-2 124M with its head; AG News' attention is 1%
    assert _time(_recipe(mixed_precision="no"), "cpu").mfu is None


def test_a_gpu_without_a_row_is_unknown_until_it_was_measured() -> None:
    """No time is made up for an unknown GPU; one measurement of it gives one."""
    gpu = GpuSpec(
        name="unknown",
        display_name="Some GPU",
        match=(),
        memory_bytes=2**34,
        peak_flops={},
        bandwidth_bytes_per_second=None,
        tdp_watts=None,
        source="",
    )
    profile = dataclasses.replace(PROFILES["rtx4070ti"], gpu=gpu)
    recipe = _recipe()
    arguments = (recipe, MODELS["gpt2"], profile, STRATEGIES["single"], _data(recipe))
    assert plan_time(*arguments) is None
    measured = record(device="Some GPU", predicted=1000.0, measured=500.0, mixed_precision="bf16")
    half = plan_time(*arguments, calibration=Calibration(records=(measured,)))
    assert half is not None
    assert "1 measurement" in half.source


def test_a_measurement_replaces_the_guess() -> None:
    """A card measured at half the predicted speed is planned at half of it, in a closer range."""
    cold = _time(_recipe())
    measured = record(device="rtx4070ti", predicted=1000.0, measured=500.0, mixed_precision="bf16")
    warm = _time(_recipe(), calibration=Calibration(records=(measured,)))
    assert warm.tokens_per_second == pytest.approx(cold.tokens_per_second / 2)
    assert warm.total.high / warm.total.expected == pytest.approx(1.15)
    assert cold.total.high / cold.total.expected == pytest.approx(1.35)
    assert "measurement" in warm.source
    assert "never measured" in cold.source
