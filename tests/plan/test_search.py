"""The search: nothing that fits is beaten without a reason, and every reason is true."""

import dataclasses
import math
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel_gpt2.catalog.models import MODELS, ModelSpec
from accel_gpt2.catalog.profiles import PROFILES, HardwareProfile
from accel_gpt2.catalog.strategies import STRATEGIES, ShardingStrategy
from accel_gpt2.errors import UsageError
from accel_gpt2.plan.candidates import CHOICES, RESULT_CHOICES, Preference
from accel_gpt2.plan.memory import MemoryPlan, plan_memory
from accel_gpt2.plan.search import Option, RunPlan, plan_run
from accel_gpt2.recipe import Layer, TrainRecipe
from accel_gpt2.recipe.layers import assignments_layer, parse_value
from accel_gpt2.recipe.resolving import resolve

# Whatever this version trains.

GPT2_MODELS = [name for name, row in MODELS.items() if row.model_type == "gpt2"]


def layer(**values: object) -> Layer:
    return Layer(origin="--set", values=values)


def planned(profile: str, *, prefer: Preference = "faithful", **values: object) -> RunPlan:
    return plan_run([layer(**values)], PROFILES[profile], prefer=prefer)


def options_of(plan: RunPlan) -> list[Option]:
    """Every candidate that was planned."""
    others = [x.option for x in plan.rejected if x.option is not None]
    return others if plan.recommended is None else [plan.recommended, *others]


def seconds(option: Option) -> float:
    assert option.time is not None
    return option.time.total.expected * option.time_share


PINS = {
    "finetuning": st.sampled_from(["full", "lora"]),
    "optimizer": st.sampled_from(["adamw", "adamw_8bit", "adafactor"]),
    "mixed_precision": st.sampled_from(["no", "bf16", "pure_bf16"]),
    "gradient_checkpointing": st.booleans(),
    "micro_batch_tokens": st.sampled_from([512, 1024, 3000, 8192]),
    "max_length": st.sampled_from([128, 512]),
    "global_batch_tokens": st.sampled_from([2048, 8192, 65_536]),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model=st.sampled_from([name for name in GPT2_MODELS if MODELS[name].hub_id]),
    dataset=st.sampled_from(["imdb", "ag_news", "sms_spam"]),
    profile=st.sampled_from(list(PROFILES)),
    prefer=st.sampled_from(["faithful", "speed", "memory", "quality"]),
    pins=st.fixed_dictionaries({}, optional=PINS),
)
def test_the_answer_is_not_beaten_by_what_was_not_rejected_for_a_true_reason(
    model: str, dataset: str, profile: str, prefer: Preference, pins: dict[str, object]
) -> None:
    """Each candidate that is not recommended has one reason, and the reason holds."""
    plan = planned(profile, prefer=prefer, model=model, dataset=dataset, **pins)
    best = plan.recommended
    for rejected in plan.rejected:
        option = rejected.option
        if option is None:
            assert rejected.why in {"refused", "unsupported"}
            continue
        usable = option.memory.usable_bytes or math.inf
        host = math.inf if plan.profile.gpu is None else plan.profile.host_memory_bytes
        fits = option.device.expected <= usable and option.host_bytes <= host
        tight = option.device.high > usable
        assert fits is (rejected.why != "does not fit")
        match rejected.why:
            case "does not fit":
                pass
            case "not needed":
                assert best is not None
                assert prefer in {"faithful", "quality"}
                assert option.strategy.is_sharded
                if option.strategy.backend == "fsdp2":
                    assert 1.15 * seconds(option) >= seconds(best)
                else:
                    more = option.strategy.offloads_optimizer > best.strategy.offloads_optimizer
                    assert more or best.strategy.backend != "deepspeed"
            case "less faithful":
                assert best is not None
                assert prefer in {"faithful", "quality"}
                assert option.level > best.level
            case "larger":
                assert best is not None
                assert prefer == "memory"
                assert option.device.expected > best.device.expected
            case "tight":
                assert best is not None
                assert tight
                if best.verdict == "tight":
                    assert option.device.high >= best.device.high
            case "slower":
                assert best is not None
                if best.time is None:  # the GPU's speed in this precision is not known
                    assert option.time is None
                else:
                    assert seconds(option) >= seconds(best) / 1.01
            case "refused" | "unsupported":
                pytest.fail("an option that was planned is not refused")
    if best is not None:
        assert best.device.expected <= (best.memory.usable_bytes or math.inf)


@pytest.mark.parametrize("prefer", ["faithful", "speed", "memory", "quality"])
def test_the_recommendation_is_the_minimum_of_an_independent_enumeration(
    prefer: Preference,
) -> None:
    """Among all that runs and fits with room, nothing is more of what was preferred."""
    compared = 0
    for profile in ("rtx4070ti", "2x-rtx4070ti", "a100-80", "t4", "cpu"):
        for model in ("gpt2", "gpt2-large", "gpt2-xl"):
            plan = planned(profile, prefer=prefer, model=model)
            roomy = [x for x in options_of(plan) if x.verdict == "fits"]
            if plan.recommended is None or plan.recommended.verdict != "fits":
                continue
            best = plan.recommended
            if prefer in {"faithful", "quality"} and not best.strategy.offloads_optimizer:
                roomy = [x for x in roomy if not x.strategy.offloads_optimizer]
            compared += len(roomy)
            if prefer == "speed":
                assert seconds(best) <= 1.01 * min(map(seconds, roomy))
            elif prefer == "memory":
                assert best.device.expected == min(x.device.expected for x in roomy)
            else:
                assert best.level == min(x.level for x in roomy)
                same = [x for x in roomy if x.level == best.level]
                if best.strategy.backend != "deepspeed":
                    same = [x for x in same if x.strategy.backend != "deepspeed"]
                sharded = [x for x in same if x.strategy.is_sharded]
                whole = [x for x in same if not x.strategy.is_sharded]
                for others, margin in ((sharded, 1.15), (whole, 1.0)):
                    more = 1.0 if best.strategy.is_sharded or others is whole else margin
                    assert all(seconds(best) <= 1.011 * more * seconds(x) for x in others)
    assert compared > 200


def choice(option: Option) -> tuple[object, ...]:
    return tuple(getattr(option.recipe, key) for key in RESULT_CHOICES)


def test_levels_come_in_the_order_of_faithfulness() -> None:
    """fp32 weights, 8-bit states, pure bf16, LoRA, QLoRA; `quality` tries fp32 before them."""
    order = [
        ("full", "bf16", "adamw"),
        ("full", "bf16", "adamw_8bit"),
        ("full", "pure_bf16", "adamw_8bit"),
        ("lora", "bf16", "adamw"),
        ("qlora", "bf16", "adamw"),
    ]
    levels = {x.level: choice(x) for x in options_of(planned("rtx4070ti", model="gpt2-large"))}
    assert [levels[i] for i in range(len(levels))] == order
    with_fp32 = planned("rtx4070ti", prefer="quality", model="gpt2-large")
    levels = {x.level: choice(x) for x in options_of(with_fp32)}
    assert [levels[i] for i in range(len(levels))] == [("full", "no", "adamw"), *order]


def test_a_machine_without_fast_bf16_is_not_offered_it() -> None:
    """A T4 emulates bf16, and a CPU computes it slowly."""
    for profile, precision in (("t4", "fp16"), ("cpu", "no")):
        tried = {x.recipe.mixed_precision for x in options_of(planned(profile, model="gpt2"))}
        assert tried == {precision}


def test_random_weights_are_trained_whole() -> None:
    """The rule of recipes that refuses an adapter on them is the reason that is given."""
    plan = planned("rtx4070ti", model="gpt2", init="scratch")
    assert {x.recipe.finetuning for x in options_of(plan)} == {"full"}
    refused = [x.reason for x in plan.rejected if x.why == "refused" and "LoRA" in x.label]
    assert any("random weights" in reason for reason in refused)


@settings(max_examples=10, deadline=None)
@given(pins=st.fixed_dictionaries({}, optional=PINS), profile=st.sampled_from(list(PROFILES)))
def test_what_was_given_is_kept_and_the_global_batch_too(
    pins: dict[str, object], profile: str
) -> None:
    """No candidate changes a pinned value; what the plan chose says so in its origin."""
    plan = planned(profile, model="gpt2-medium", **pins)
    asked = resolve([layer(model="gpt2-medium", **pins)]).recipe
    options = options_of(plan)
    assert options or plan.rejected
    for option in options:
        assert all(getattr(option.recipe, key) == value for key, value in pins.items())
        assert option.recipe.global_batch_tokens == asked.global_batch_tokens
        for key in set(CHOICES) - set(pins):
            assert option.resolved.origins[key] == f"plan for {profile}"


def typed(change: str, layers: Sequence[Layer]) -> list[Layer]:
    """Layers with what a sentence said to type, as the command line reads it."""
    words = change.split()
    values: dict[str, object] = {}
    while words:
        option = words.pop(0)
        if option == "--set":
            values |= assignments_layer([words.pop(0)]).values
        elif option.endswith("gradient-checkpointing"):
            values["gradient_checkpointing"] = not option.startswith("--no-")
        else:
            key = option.removeprefix("--").replace("-", "_")
            values[key] = parse_value(key, words.pop(0))
    return [*layers, Layer(origin="typed", values=values)]


@pytest.mark.parametrize(
    ("profile", "values"),
    [
        ("rtx4070ti-12gb", {"model": "gpt2-xl", "finetuning": "full", "optimizer": "adamw"}),
        ("rtx4070ti", {"model": "gpt2-xl", "mixed_precision": "bf16", "finetuning": "full"}),
        ("rtx4070ti-12gb", {"model": "gpt2-medium", "mixed_precision": "no", "finetuning": "full",
                            "gradient_checkpointing": False, "micro_batch_tokens": 8192}),
        ("rtx4070ti-12gb", {"model": "gpt2-large", "gradient_checkpointing": False,
                            "mixed_precision": "bf16", "finetuning": "full",
                            "optimizer": "adamw"}),
        ("rtx4070ti", dict(zip(RESULT_CHOICES, ("full", "no", "adamw"), strict=True))
         | {"model": "gpt2-xl"}),
    ],
)  # fmt: skip
def test_the_nearest_change_fits_when_it_is_typed(profile: str, values: dict[str, object]) -> None:
    """What does not fit in a GPU as it was pinned comes with words that make it fit."""
    layers = [layer(**values)]
    single = STRATEGIES["single"]
    plan = plan_run(layers, PROFILES[profile], strategy=single)
    assert plan.recommended is None
    assert plan.nearest is not None
    changed = typed(plan.nearest.change, layers)
    machine = PROFILES[
        next((str(x.values["profile"]) for x in changed if "profile" in x.values), profile)
    ]
    assert plan_run(changed, machine, strategy=single).recommended is not None


def test_what_does_not_go_together_has_its_reason() -> None:
    """8-bit states do not go with ZeRO, and the plan says so without planning it."""
    plan = planned("2x-rtx4070ti", model="gpt2-large", optimizer="adamw_8bit")
    refused = {x.label: x.reason for x in plan.rejected if x.why == "unsupported"}
    label = "full fine-tuning, bf16, 8-bit AdamW, zero2_offload"
    assert "could not be saved whole" in refused[label]


def test_what_fits_only_in_shares_is_trained_in_shares() -> None:
    """GPT-2 XL with fp32 weights on four cards: no whole model fits on one of them."""
    plan = planned("4x-rtx3090", model="gpt2-xl")
    assert plan.recommended is not None
    assert (plan.recommended.strategy.name, plan.recommended.level) == ("fsdp2", 0)
    options = [option for option in options_of(plan) if option.level == 0]
    assert all(option.strategy.is_sharded for option in options if option.verdict == "fits")


def test_classes_side_by_side_need_the_memory_of_each_and_their_share_of_the_time() -> None:
    """Two processes on one GPU hold twice the bytes; one class per GPU takes half the time."""
    one = {x.placement: x for x in options_of(planned("rtx4070ti", model="gpt2"))
           if x.strategy.name == "single" and x.level == 0 and x.recipe.micro_batch_tokens == 1024
           and not x.recipe.gradient_checkpointing}  # fmt: skip
    assert one["concurrent"].device.expected == 2 * one["sequential"].device.expected
    two = planned("2x-rtx4070ti", model="gpt2")
    per_gpu = next(x for x in options_of(two) if x.placement == "per-gpu")
    assert per_gpu.time is not None
    assert per_gpu.seconds is not None
    assert per_gpu.seconds.expected == pytest.approx(per_gpu.time.total.expected / 2)
    assert per_gpu.device == per_gpu.memory.device


def test_a_shared_base_is_resident_once() -> None:
    """Four LoRA classes on one base need far less than four processes."""
    plan = planned("a100-80", model="gpt2-xl", dataset="ag_news", finetuning="lora")
    need = {}
    for option in options_of(plan):
        recipe = option.recipe
        alone = option.strategy.backend == "none" and recipe.checkpointed_layers is None
        if alone and recipe.micro_batch_tokens == 1280 and recipe.gradient_checkpointing:
            need[option.placement] = option.device.expected
    assert need["sequential"] < need["shared-base"] < 1.2 * need["sequential"]
    assert need["concurrent"] == 4 * need["sequential"]


def test_a_data_set_that_is_not_known_leaves_the_time_open_and_the_speeds_compared() -> None:
    """A file that was not read: no total, and still the fastest that fits."""
    plan = planned("rtx4070ti", model="gpt2", dataset="texts.csv")
    assert plan.data is None
    assert plan.recommended is not None
    assert plan.recommended.seconds is None
    assert plan.recommended.time is not None
    slower = [x for x in plan.rejected if x.why == "slower"]
    assert slower
    assert all("s" in x.reason for x in slower)


def test_the_price_of_the_machine_gives_the_cost() -> None:
    """Two dollars an hour for the expected time."""
    plan = planned("a100-40", model="gpt2", price_usd_per_hour=2.0)
    option = plan.recommended
    assert option is not None
    assert option.seconds is not None
    assert option.cost_usd == pytest.approx(option.seconds.expected / 1800)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_that_is_asked_for_is_the_only_one(name: str) -> None:
    """Also where another is better; one process on a machine of two GPUs is a choice too."""
    plan = plan_run([layer(model="gpt2")], PROFILES["2x-rtx4070ti"], strategy=STRATEGIES[name])
    assert {option.strategy.name for option in options_of(plan)} == {name}
    assert "sequential" in {option.placement for option in options_of(plan)}


def test_a_placement_that_is_asked_for_is_the_only_one() -> None:
    """It leaves each model whole; without one the plan says in the recipe which it chose."""
    plan = plan_run([layer(model="gpt2", placement="per-gpu")], PROFILES["2x-rtx4070ti"])
    chosen = {(x.strategy.name, x.placement, x.recipe.placement) for x in options_of(plan)}
    assert chosen == {("single", "per-gpu", "per-gpu")}
    for option in options_of(planned("2x-rtx4070ti", model="gpt2")):
        assert option.recipe.placement == option.placement
        assert option.resolved.origins["placement"] == "plan for 2x-rtx4070ti"


def test_what_nothing_can_train_is_a_usage_error() -> None:
    """A strategy and a recipe that exclude each other, with the reason and what to type."""
    said = r"gpt2 cannot be trained as asked: .*DTensors; give --optimizer adamw or --strategy ddp"
    with pytest.raises(UsageError, match=said):
        plan_run(
            [layer(model="gpt2", optimizer="adamw_8bit")],
            PROFILES["2x-rtx4070ti"],
            strategy=STRATEGIES["fsdp2"],
        )


def test_a_wrong_recipe_is_a_usage_error() -> None:
    """Contradictions in what was given are complained about, not searched around."""
    with pytest.raises(UsageError, match="an adapter on random weights"):
        planned("rtx4070ti", model="gpt2", init="scratch", finetuning="lora")


def test_what_steps_on_the_host_is_a_last_resort_unless_it_is_asked_for() -> None:
    """GPT-2 XL's fp32 weights fit on 16 GB with offload: shown, with why not, and kept if asked."""
    machine = dataclasses.replace(PROFILES["rtx4070ti"], host_memory_bytes=64 * 2**30)
    plan = plan_run([layer(model="gpt2-xl")], machine)
    assert plan.recommended is not None
    assert not plan.recommended.strategy.offloads_optimizer
    offloading = [x.option for x in plan.alternatives if x.why == "not needed"]
    assert any(x is not None and x.level == 0 for x in offloading)
    asked = plan_run([layer(model="gpt2-xl")], machine, strategy=STRATEGIES["zero2_offload"])
    assert asked.recommended is not None
    assert asked.recommended.strategy.name == "zero2_offload"
    assert asked.recommended.level == 0


def test_few_candidates_are_planned() -> None:
    """A plan takes as long as its candidates do, and none is larger than one that does not fit."""
    calls = 0

    def counted(
        recipe: TrainRecipe,
        spec: ModelSpec,
        machine: HardwareProfile,
        strategy: ShardingStrategy,
        *,
        longest_tokens: int,
    ) -> MemoryPlan:
        nonlocal calls
        calls += 1
        return plan_memory(recipe, spec, machine, strategy, longest_tokens=longest_tokens)

    asked, machines = [layer(model="gpt2-xl")], PROFILES["2x-rtx4070ti"]
    quick = plan_run(asked, machines, depth="some", memory_of=counted)
    assert 50 < calls <= 240
    whole = plan_run(asked, machines, depth="all")
    assert quick.recommended is not None
    assert quick.recommended == whole.recommended
    assert len(quick.rejected) < len(whole.rejected)
