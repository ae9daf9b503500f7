"""What a memory plan says: terms add up, shares shrink, and the verdict follows."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_gpt2.catalog.models import MODELS, ModelSpec
from accel_gpt2.catalog.optimizers import OPTIMIZERS
from accel_gpt2.catalog.profiles import PROFILES, HardwareProfile
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.data.batching import epoch_batches, split_micro_batches
from accel_gpt2.plan.memory import (
    ByteRange,
    MemoryPlan,
    covers,
    micro_batch,
    plan_memory,
)
from accel_gpt2.recipe import MixedPrecision, TrainRecipe
from accel_gpt2.units import GIB

ONE_CARD = PROFILES["rtx4070ti"]


def _shape(*, n_layer: int = 4, n_embd: int = 256, vocab_size: int = 8192) -> ModelSpec:
    return ModelSpec(
        name="shape",
        n_layer=n_layer,
        n_head=n_embd // 64,
        n_embd=n_embd,
        n_positions=1024,
        vocab_size=vocab_size,
        hub_id=None,
        source="this test",
    )


def _plan(
    recipe: TrainRecipe,
    model: ModelSpec | None = None,
    profile: HardwareProfile = ONE_CARD,
    strategy: str = "single",
    *,
    longest_tokens: int = 257,
    stock_loss: bool = False,
) -> MemoryPlan:
    return plan_memory(
        recipe,
        model or _shape(),
        profile,
        STRATEGIES[strategy],
        longest_tokens=longest_tokens,
        stock_loss=stock_loss,
    )


def _bytes(plan: MemoryPlan, phase: str, *names: str) -> int:
    """Of the terms of these names in a phase."""
    (found,) = (x for x in plan.phases if x.name == phase)
    return sum(term.bytes for term in found.terms if term.name in names)


recipes = st.builds(
    TrainRecipe,
    mixed_precision=st.sampled_from(["no", "fp16", "bf16", "pure_bf16"]),
    finetuning=st.sampled_from(["full", "lora", "qlora"]),
    quantization=st.sampled_from(["nf4", "int8"]),
    use_dora=st.booleans(),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    bf16_rounding=st.sampled_from(["stochastic", "kahan"]),
    dropout=st.sampled_from([0.0, 0.1]),
    lora_dropout=st.sampled_from([0.0, 0.1]),
    lora_rank=st.integers(1, 64),
    lora_target_modules=st.sampled_from([(), ("c_attn",), ("c_attn", "c_fc"), ("mlp.c_proj",)]),
    fused_gelu=st.booleans(),
    gradient_checkpointing=st.booleans(),
    checkpointed_layers=st.none() | st.integers(1, 48),
    release_gradients=st.booleans(),
    micro_batch_tokens=st.integers(256, 16384),
    global_batch_tokens=st.integers(256, 32768),
    loss_chunk_tokens=st.integers(16, 2048),
)
profiles = st.sampled_from(sorted(PROFILES)).map(PROFILES.__getitem__)
shapes = st.builds(
    _shape,
    n_layer=st.integers(1, 48),
    n_embd=st.integers(1, 25).map(lambda heads: 64 * heads),
    vocab_size=st.integers(512, 50257),
)


@given(recipes, shapes, profiles, st.sampled_from(sorted(STRATEGIES)), st.booleans())
def test_terms_are_whole_and_add_up(
    recipe: TrainRecipe, model: ModelSpec, profile: HardwareProfile, strategy: str, stock: bool
) -> None:
    """No term of any phase is negative, names are unique, and what is allocated is their sum."""
    plan = _plan(recipe, model, profile, strategy, stock_loss=stock)
    for phase in plan.phases:
        assert all(term.bytes > 0 and term.why for term in phase.terms)
        assert len({term.name for term in phase.terms}) == len(phase.terms), phase
        assert phase.bytes == sum(term.bytes for term in phase.terms) <= plan.allocated_bytes
    for some in (plan.reserved, plan.device):
        assert plan.allocated_bytes <= some.low <= some.expected <= some.high
    assert plan.terms == plan.peak.terms
    assert plan.host_bytes > 0
    assert plan.disk_bytes > 0
    assert plan.peak.name in plan.advice(recipe)


@given(recipes, shapes, profiles, st.sampled_from(sorted(STRATEGIES)), st.booleans(), st.data())
def test_more_needs_more(
    recipe: TrainRecipe,
    model: ModelSpec,
    profile: HardwareProfile,
    strategy: str,
    stock: bool,
    data: st.DataObject,
) -> None:
    """Memory never falls with the batch, the documents' length, the depth, or the width."""
    # Always several micro batches: with one alone, no gradients lie beside it.
    recipe = dataclasses.replace(recipe, global_batch_tokens=10**6)
    plan = _plan(recipe, model, profile, strategy, stock_loss=stock)
    more = data.draw(st.integers(1, 4096), "more")
    larger = {
        "batch": _plan(
            dataclasses.replace(recipe, micro_batch_tokens=recipe.micro_batch_tokens + more),
            model,
            profile,
            strategy,
            stock_loss=stock,
        ),
        "length": _plan(
            recipe, model, profile, strategy, longest_tokens=257 + more, stock_loss=stock
        ),
        "depth": _plan(
            recipe,
            dataclasses.replace(model, n_layer=model.n_layer + 1),
            profile,
            strategy,
            stock_loss=stock,
        ),
        "width": _plan(
            recipe,
            dataclasses.replace(model, n_embd=model.n_embd + 64, n_head=model.n_head + 1),
            profile,
            strategy,
            stock_loss=stock,
        ),
    }
    for name, other in larger.items():
        assert other.allocated_bytes >= plan.allocated_bytes, name


@given(recipes, shapes, st.sampled_from([x for x, row in STRATEGIES.items() if row.is_sharded]))
def test_shards_are_never_larger_than_the_whole(
    recipe: TrainRecipe, model: ModelSpec, strategy: str
) -> None:
    """What a strategy shards takes no more than without it, and less on four GPUs than on two."""
    row = STRATEGIES[strategy]
    # Released gradients are of one process; plan.support refuses more.
    recipe = dataclasses.replace(recipe, finetuning="full", release_gradients=False)
    two, four = (
        _plan(recipe, model, PROFILES[name], strategy) for name in ("2x-rtx4070ti", "4x-rtx4090")
    )
    states = ["optimizer state"] if row.shards_optimizer else []
    for whole, *shards in (
        [_plan(recipe, model), two, four],
        [two, four],
    ):
        for term in states:
            held = _bytes(whole, "optimizer step", term)
            assert all(_bytes(shard, "optimizer step", term) <= held for shard in shards)
    if row.shards_parameters and not row.offloads_parameters:
        assert _bytes(four, "forward", "parameters") < _bytes(two, "forward", "parameters")
        whole_bytes = 4 * model.num_parameters
        assert _bytes(two, "forward", "parameters") <= whole_bytes / 2 + 1
    if row.shards_gradients:
        gradients = [_bytes(plan, "optimizer step", "gradients") for plan in (two, four)]
        assert gradients[1] < gradients[0] <= 4 * model.num_parameters / 2 + 1


@given(recipes, shapes)
def test_checkpointing_saves(recipe: TrainRecipe, model: ModelSpec) -> None:
    """Block inputs never take more than all that is saved of the blocks."""
    recipe = dataclasses.replace(recipe, finetuning="full")
    saved, inputs = (
        _plan(dataclasses.replace(recipe, gradient_checkpointing=choice), model)
        for choice in (False, True)
    )
    for phase in ("forward", "loss backward"):
        held = _bytes(inputs, phase, "block inputs", "last block's output")
        assert held <= _bytes(saved, phase, "saved activations")


@settings(max_examples=200, deadline=None)
@given(
    st.integers(256, 8192),
    st.integers(256, 16384),
    st.sampled_from([1, 2, 4]),
    st.floats(20, 300),
    st.floats(0.2, 0.9),
    st.integers(0, 2**16),
)
def test_no_micro_batch_is_larger(
    micro_batch_tokens: int,
    global_batch_tokens: int,
    world_size: int,
    median: float,
    spread: float,
    seed: int,
) -> None:
    """The batches that the loop would make are within what is planned, and come as planned."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(np.log(median), spread, 3000), 3, 1024).astype(np.int64)
    recipe = TrainRecipe(
        micro_batch_tokens=micro_batch_tokens, global_batch_tokens=global_batch_tokens
    )
    tokens, accumulates = micro_batch(
        recipe, longest_tokens=int(lengths.max()), world_size=world_size
    )
    batches = epoch_batches(
        lengths,
        global_batch_tokens=global_batch_tokens,
        global_batch_size=None,
        seed=seed,
        epoch=0,
    )
    for batch in batches:
        steps = split_micro_batches(
            lengths, batch, world_size=world_size, micro_batch_tokens=micro_batch_tokens
        )
        assert accumulates or len(steps) == 1
        for piece in (piece for step in steps for piece in step if len(piece)):
            assert len(piece) * (lengths[piece].max() - 1) <= tokens


def test_what_the_closed_form_knows() -> None:
    """GPT-2 as a language model, and adapters on its four projections; the trace has the rest."""
    gpt2, roberta = MODELS["gpt2"], MODELS["roberta-base"]
    assert covers(TrainRecipe(finetuning="lora", lora_target_modules=("mlp.c_proj",)), gpt2)
    assert not covers(TrainRecipe(finetuning="lora", lora_target_modules=("wte",)), gpt2)
    assert not covers(TrainRecipe(objective="hybrid"), gpt2)
    assert not covers(TrainRecipe(objective="masked_lm"), roberta)


@pytest.mark.parametrize(
    ("usable_bytes", "verdict"),
    [(None, "fits"), (30, "fits"), (29, "tight"), (20, "tight"), (19, "does not fit")],
)
def test_the_verdict_follows_the_range(usable_bytes: int | None, verdict: str) -> None:
    """All of the range fits, or its middle, or not even that."""
    plan = _plan(TrainRecipe())
    device = ByteRange(low=10, expected=20, high=30)
    plan = dataclasses.replace(plan, device=device, usable_bytes=usable_bytes)
    assert plan.verdict == verdict


def test_known_answers() -> None:
    """GPT-2 XL whole in fp32 does not fit a 16 GB card; small does; XL's adapter on NF4 does."""
    xl, small = MODELS["gpt2-xl"], MODELS["gpt2"]
    recipe = TrainRecipe(mixed_precision="bf16", gradient_checkpointing=True)
    assert _plan(recipe, xl, longest_tokens=1024).verdict == "does not fit"
    assert _plan(recipe, small, longest_tokens=1024).verdict == "fits"
    adapter = dataclasses.replace(recipe, finetuning="qlora", micro_batch_tokens=1024)
    plan = _plan(adapter, xl, longest_tokens=1024)
    assert plan.verdict == "fits"
    assert plan.device.high < 8 * GIB


def test_the_machine_without_a_gpu() -> None:
    """The device is the RAM: no CUDA, and what is usable is the machine's own figure."""
    plan = _plan(TrainRecipe(dropout=0.0), MODELS["gpt2-tiny"], PROFILES["cpu"])
    assert plan.usable_bytes == PROFILES["cpu"].host_memory_bytes
    assert plan.reserved.high == plan.allocated_bytes
    assert not _bytes(plan, "forward", "cuBLAS workspaces")
    assert plan.verdict == "fits"


def test_scores_by_halves_take_memory_where_they_are_made() -> None:
    """On an A100, not on an RTX 4090: two fp16 numbers, one of them twice, of each hidden one."""
    recipe = TrainRecipe(mixed_precision="bf16", micro_batch_tokens=2048)
    scored = [
        _bytes(_plan(recipe, profile=PROFILES[name]), "evaluation", "scoring")
        for name in ("rtx4090", "a100-40")
    ]
    assert scored[1] - scored[0] == 14 * 2048 * _shape().n_embd


def test_advice_is_about_what_is_largest() -> None:
    """What a person is told to change is in the peak phase, and changing it lowers the peak."""
    recipe = TrainRecipe(mixed_precision="bf16", micro_batch_tokens=16384)
    plan = _plan(recipe, MODELS["gpt2"], longest_tokens=1024)
    assert "give --gradient-checkpointing" in plan.advice(recipe)
    changed = dataclasses.replace(recipe, gradient_checkpointing=True)
    assert _plan(changed, MODELS["gpt2"], longest_tokens=1024).allocated_bytes < (
        plan.allocated_bytes / 2
    )


def test_advice_is_not_what_the_recipe_does_already() -> None:
    """With 8-bit states no other optimizer is named, and random weights have no use for LoRA."""
    recipe = TrainRecipe(
        mixed_precision="pure_bf16", optimizer="adamw_8bit", gradient_checkpointing=True
    )
    plan = _plan(recipe, MODELS["gpt2-xl"], longest_tokens=1024)
    assert "--optimizer" not in plan.advice(recipe)
    scratch = dataclasses.replace(recipe, init="scratch")
    assert "lora" not in _plan(scratch, MODELS["gpt2-xl"], longest_tokens=1024).advice(scratch)


def test_ddp_has_no_share_and_a_second_copy_of_the_gradients() -> None:
    """DDP's buckets are as large as the gradients."""
    plan = _plan(TrainRecipe(), profile=PROFILES["2x-rtx4070ti"], strategy="ddp")
    assert _bytes(plan, "optimizer step", "DDP buckets") == _bytes(
        plan, "optimizer step", "gradients"
    )


def test_zero_adds_bf16_gradients_up_in_fp32() -> None:
    """4 bytes for each parameter of the share; where the optimizer is offloaded to the host, there
    (stage 3), or 2 bytes as DeepSpeed's stage 2 has it."""
    recipe = TrainRecipe(mixed_precision="bf16")
    plans = {
        name: _plan(recipe, profile=PROFILES["2x-rtx4070ti"], strategy=name)
        for name in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
    }
    num_parameters = _shape().num_parameters
    for name, share in (("zero1", 1), ("zero2", 2), ("zero3", 2)):
        assert _bytes(plans[name], "optimizer step", "gradients") == 4 * num_parameters / share
    temporaries = {
        name: _bytes(plans[name], "optimizer step", "optimizer temporaries")
        for name in ("zero1", "zero2", "zero3")
    }
    assert temporaries["zero1"] == temporaries["zero3"]
    # The sums of stage 2 are what the optimizer steps with; the others have a copy.
    assert temporaries["zero1"] - temporaries["zero2"] == 4 * num_parameters / 2
    host = {
        name: next(x.bytes for x in plans[name].host if x.name == "offloaded optimizer")
        for name in ("zero2_offload", "zero3_offload")
    }
    assert host["zero3_offload"] - host["zero2_offload"] == 2 * num_parameters


def test_zero_3_copies_a_bucket_only_while_it_exchanges_it() -> None:
    """Two buckets at the loss, one to fill and one of weights ahead; three in the backward pass."""
    plan = _plan(
        TrainRecipe(mixed_precision="bf16"), profile=PROFILES["2x-rtx4070ti"], strategy="zero3"
    )
    bucket = 2 * STRATEGIES["zero3"].bucket_elements
    assert _bytes(plan, "loss backward", "exchange buckets") == 2 * bucket
    assert _bytes(plan, "block backward", "exchange buckets") == 2 * bucket
    assert _bytes(plan, "block backward", "exchanged gradients") == bucket
    at_loss = next(phase for phase in plan.phases if phase.name == "loss backward")
    assert "exchanged gradients" not in {term.name for term in at_loss.terms}


@pytest.mark.parametrize(("precision", "width"), [("no", 4), ("bf16", 2)])
def test_offload_keeps_state_weights_and_gradients_of_each_parameter_on_the_host(
    precision: MixedPrecision, width: int
) -> None:
    """8 bytes of AdamW's moments, 4 + 4 in fp32, and a gradient as wide as the model's weights."""
    recipe = TrainRecipe(mixed_precision=precision)
    plan = _plan(recipe, profile=PROFILES["2x-rtx4070ti"], strategy="zero2_offload")
    (offloaded,) = (x.bytes for x in plan.host if x.name == "offloaded optimizer")
    assert offloaded == (8 + 4 + 4 + width) * _shape().num_parameters


def test_what_a_model_leaves_on_the_disk() -> None:
    """The newest checkpoint, the best one, one that is being written, and the model."""
    plan = plan_memory(
        TrainRecipe(keep_checkpoints=1),
        _shape(),
        ONE_CARD,
        STRATEGIES["single"],
        longest_tokens=257,
    )
    checkpoint = 12 * _shape().num_parameters
    assert [(x.name, x.bytes) for x in plan.disk] == [
        ("checkpoints", 3 * checkpoint),
        ("final models", checkpoint // 3),
    ]


def test_a_plan_takes_less_than_a_millisecond() -> None:
    """A search over thousands of recipes stays within seconds; the fastest of many is timed."""
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        _plan(TrainRecipe(), MODELS["gpt2-xl"], longest_tokens=1024)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1e-3
