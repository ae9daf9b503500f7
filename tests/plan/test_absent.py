"""Of every term that some training lacks it is said when it is there."""

import itertools

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.plan.absent import WHEN_THERE
from accel_gpt2.plan.data import dataset_statistics
from accel_gpt2.plan.memory import plan_memory
from accel_gpt2.plan.throughput import plan_time
from accel_gpt2.recipe import Finetuning, MixedPrecision, TrainRecipe

FINETUNING: tuple[Finetuning, ...] = ("full", "lora")
PRECISIONS: tuple[MixedPrecision, ...] = ("no", "bf16", "pure_bf16")


def test_every_term_that_may_be_absent_has_its_phrase_and_no_phrase_is_of_nothing() -> None:
    """Over precisions, strategies, adapters, checkpointing, losses and devices."""
    names: list[set[str]] = []
    data = dataset_statistics(TrainRecipe())
    assert data is not None
    for finetuning, precision, checkpointed, strategy, stock in itertools.product(
        FINETUNING, PRECISIONS, (None, 3, 12), STRATEGIES.values(), (False, True)
    ):
        for release, optimizer, machine in (
            (False, "adamw", "2x-rtx4070ti"),
            (strategy.backend == "none", "adamw_paged", "a100-80"),
            (False, "adafactor", "cpu"),
        ):
            recipe = TrainRecipe(
                finetuning=finetuning,
                mixed_precision=precision,
                optimizer=optimizer,
                gradient_checkpointing=checkpointed is not None,
                checkpointed_layers=checkpointed,
                release_gradients=release,
                global_batch_tokens=2048,
                test_split="none" if stock else "test",
            )
            model, profile = MODELS["gpt2"], PROFILES[machine]
            memory = plan_memory(
                recipe, model, profile, strategy, longest_tokens=1024, stock_loss=stock
            )
            time = plan_time(recipe, model, profile, strategy, dataset_statistics(recipe) or data)
            assert time is not None
            terms = [*memory.host, *memory.disk, *(x for p in memory.phases for x in p.terms)]
            names.append({x.name for x in (*terms, *time.terms, *time.step_terms)})
    ever, always = set.union(*names), set.intersection(*names)
    assert len(names) > 200
    assert ever - always <= set(WHEN_THERE), ever - always - set(WHEN_THERE)
    assert set(WHEN_THERE) <= ever, set(WHEN_THERE) - ever
