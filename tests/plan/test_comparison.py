"""Which runs a comparison consists of, in which order, with which recipes."""

from pathlib import Path

import pytest

from accel_gpt2.catalog.arms import ARMS
from accel_gpt2.errors import UsageError
from accel_gpt2.plan.comparison import PlannedRun, plan_runs, select_arms
from accel_gpt2.recipe import Layer, TrainRecipe
from accel_gpt2.recipe.resolving import resolve

TINY = resolve([Layer(origin="test", values={"model": "gpt2-tiny", "epochs": 2.5})]).recipe


def planned(arms: str, recipe: TrainRecipe = TINY, **options: object) -> list[PlannedRun]:
    """The runs of these arms in the directory `runs/c`, with a small encoder."""
    given = {"encoder": "roberta-tiny", "directory": Path("runs/c"), **options}
    return list(plan_runs(select_arms(arms), recipe, **given))  # type: ignore[arg-type]


def resolved(run: PlannedRun, model: str = "gpt2-tiny") -> TrainRecipe:
    """The recipe of a run, over what a person gave."""
    given = Layer(origin="test", values={"model": model, "epochs": 2.5})
    return resolve([given, run.layer]).recipe


@pytest.mark.parametrize("arms", ["", " , ", "9", "0", "7d", "three", "1,2,x", "all,3"])
def test_what_is_no_arm_is_refused(arms: str) -> None:
    """The message names the arms that there are."""
    with pytest.raises(UsageError, match="numbers from 1 to 8 or ids"):
        select_arms(arms)


def test_arms_come_in_their_own_order_and_once() -> None:
    """However they are typed."""
    assert [arm.id for arm in select_arms("7,3,1a,3")] == ["1a", "3", "7a", "7b", "7c"]
    assert select_arms(" ALL ") == tuple(ARMS.values())


def test_every_arm_comes_once_before_any_comes_again() -> None:
    """A comparison that is stopped early has something to say about each."""
    runs = planned("1a,3,5", num_seeds=2, train_documents=[8, 64])
    assert [run.directory.split("/")[1] for run in runs[::3]] == [
        "seed-0",
        "seed-1",
        "documents-64-seed-0",
        "documents-64-seed-1",
        "documents-8-seed-0",
        "documents-8-seed-1",
    ]
    assert [run.is_main for run in runs] == [True] * 3 + [False] * 15
    for run in runs:
        recipe = resolved(run)
        assert (recipe.seed, recipe.train_documents_per_class) == (
            run.seed,
            run.documents_per_class,
        )


def test_entries_of_one_training_are_one_run() -> None:
    """Arm 7 is trained once and evaluated three times."""
    (run,) = planned("7")
    assert [arm.id for arm in run.arms] == ["7a", "7b", "7c"]
    assert (resolved(run).model, resolved(run).objective) == ("roberta-tiny", "masked_lm")


def test_zero_shot_runs_once() -> None:
    """No seed and no number of training documents changes a model that is not trained."""
    runs = planned("2", num_seeds=3, train_documents=[64])
    assert [run.directory for run in runs] == ["arm-2-zero-shot/seed-0"]


def test_without_pretrained_weights_adapters_get_a_base() -> None:
    """It comes first, and the adapters keep all of the comparison's values but the model's own."""
    base, adapters = planned("4")
    assert (base.arms, base.directory, adapters.base) == ((), "base/seed-0", "base/seed-0")
    assert resolved(base).objective == "unconditional"
    recipe = resolved(adapters)
    assert (recipe.finetuning, recipe.init, recipe.tokenizer) == ("lora", "pretrained", "auto")
    assert recipe.model == "runs/c/base/seed-0/class-all/final"
    assert (recipe.epochs, recipe.learning_rate, recipe.max_length, recipe.global_batch_tokens) == (
        TINY.epochs,
        TINY.learning_rate,
        TINY.max_length,
        TINY.global_batch_tokens,
    )


def test_pretrained_weights_are_the_base() -> None:
    """Nothing else is trained for arm 4 where there are some."""
    (run,) = planned("4", TrainRecipe(), encoder="roberta-base")
    assert (run.base, resolved(run, "gpt2").model) == (None, "gpt2")


@pytest.mark.parametrize(("arms", "expected"), [("3,6", 512), ("3,5", 1024)])
def test_all_arms_read_equally_much(arms: str, expected: int) -> None:
    """An encoder with fewer positions shortens the documents of all."""
    runs = planned(arms, TrainRecipe(), encoder="roberta-base")
    assert [resolved(run, "gpt2").max_length for run in runs] == [expected, expected]
