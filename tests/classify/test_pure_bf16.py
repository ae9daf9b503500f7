"""Runs whose weights are bf16: trained, stopped, resumed, exported and scored."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, RobertaConfig

from accel_gpt2.classify.evaluate import evaluate_run
from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.prepare import prepare_data
from accel_gpt2.recipe import ResolvedRecipe
from accel_gpt2.train.checkpoint import list_checkpoints, read_checkpoint
from accel_gpt2.train.loop import validation_scores_path
from accel_gpt2.train.model import load_final
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.scoring import score_documents
from tests.conftest import write_texts

from .conftest import read_log, resolve_tiny
from .runs import assert_same_models, final_weights, losses, train_and_stop

Resolve = Callable[..., ResolvedRecipe]


@pytest.fixture(scope="module")
def resolve_small(tmp_path_factory: pytest.TempPathFactory) -> Resolve:
    """Recipes of two classes and models of one narrow layer: CPUs compute in bf16 a hundred times
    more slowly than in fp32."""
    folder = tmp_path_factory.mktemp("small")
    texts_file = write_texts(folder / "texts.csv", documents_per_class=30, num_classes=2)
    configs = {
        "gpt2": GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64),
        "roberta": RobertaConfig(
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_size=32,
            intermediate_size=64,
            max_position_embeddings=66,
        ),
    }
    for name, config in configs.items():
        config.save_pretrained(folder / name)

    def resolve(**changes: Any) -> ResolvedRecipe:
        small = {
            "init": "scratch",
            "tokenizer": "train",
            "learning_rate": 1e-2,
            "mixed_precision": "pure_bf16",
            "max_steps": 6,
            "epochs": 4.0,
            "max_length": 24,
            **changes,
        }
        return resolve_tiny(
            texts_file, **{**small, "model": str(folder / small.get("model", "gpt2"))}
        )

    return resolve


@pytest.fixture(scope="module")
def bf16_recipe(resolve_small: Resolve) -> ResolvedRecipe:
    """What `bf16_run` is trained by."""
    return resolve_small()


@pytest.fixture(scope="module")
def bf16_run(
    bf16_recipe: ResolvedRecipe, tmp_path_factory: pytest.TempPathFactory, session_cache: Path
) -> Path:
    """A finished run of bf16 weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
        run = tmp_path_factory.mktemp("bf16") / "run"
        fit(bf16_recipe, run, quiet=True)
    # Each class's end collects garbage; what the libraries made at import is none, and is large.
    gc.freeze()
    return run


def test_bf16_weights_learn_and_stay_bf16(bf16_run: Path) -> None:
    """The loss falls; what is exported and what a checkpoint holds is bf16, moments included."""
    of_class = [loss for index, _, loss in losses(bf16_run) if index == 0]
    assert of_class[-1] < of_class[0] - 0.3
    for tensors in final_weights(bf16_run):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    checkpoint = read_checkpoint(list_checkpoints(next(bf16_run.glob("class-0-*")))[0])
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {torch.bfloat16}
    for state in checkpoint.optimizer["optimizer"]["state"].values():
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.bfloat16,) * 2


def test_a_bf16_run_says_what_it_writes(bf16_run: Path) -> None:
    """The bytes announced are those of the files, but for what surrounds small tensors."""
    plan = json.loads((bf16_run / "plan.json").read_text())
    checkpoint = list_checkpoints(next(bf16_run.glob("class-0-*")))[0]
    files = [checkpoint / name for name in ("model.safetensors", "optimizer.pt")]
    written = sum(file.stat().st_size for file in files)
    assert plan["checkpoint_bytes"] == 6 * plan["num_trainable_parameters"]
    assert written == pytest.approx(plan["checkpoint_bytes"], rel=0.15)


def test_the_export_scores_as_the_training_did(bf16_run: Path, bf16_recipe: ResolvedRecipe) -> None:
    """Read back, the model gives the validation documents the very numbers of its last
    evaluation; plain transformers reads bf16 and gives the same up to bf16's logits."""
    recipe = bf16_recipe.recipe
    class_directory = next(bf16_run.glob("class-0-*"))
    steps = [
        row["step"] for row in read_log(bf16_run) if row.get("best") and row["class_index"] == 0
    ]
    in_training = np.load(validation_scores_path(class_directory, steps[-1]))
    validation = prepare_data(recipe, progress=False).validation
    model = load_final(class_directory / "final", recipe)
    again = score_documents(
        model,
        validation,
        micro_batch_tokens=recipe.micro_batch_tokens,
        accelerator=build_accelerator(recipe),
    )
    assert np.array_equal(again, in_training)

    plain = AutoModelForCausalLM.from_pretrained(class_directory / "final")
    assert plain.dtype == torch.bfloat16
    ids = torch.from_numpy(validation.document(0).astype(np.int64))[None]
    with torch.no_grad():
        log_p = plain(input_ids=ids).logits.float().log_softmax(-1)[0, :-1]
    theirs = log_p.gather(1, ids[0, 1:, None]).sum().item()
    assert theirs == pytest.approx(again[0], rel=0.01)
    exact = plain.float()
    with torch.no_grad():
        log_p = exact(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    assert log_p.gather(1, ids[0, 1:, None]).sum().item() == pytest.approx(again[0], rel=0.003)


@pytest.mark.parametrize(
    ("optimizer", "rounding"), [("adamw", "stochastic"), ("adamw_8bit", "kahan")]
)
def test_a_stopped_bf16_run_goes_on_bit_for_bit(
    bf16_run: Path,
    bf16_recipe: ResolvedRecipe,
    resolve_small: Resolve,
    tmp_path: Path,
    optimizer: str,
    rounding: str,
) -> None:
    """Stopped inside an epoch and started again: the same losses, the same weights."""
    whole, recipe = bf16_run, bf16_recipe
    if optimizer != "adamw":
        recipe = resolve_small(optimizer=optimizer, bf16_rounding=rounding)
        whole = tmp_path / "whole"
        fit(recipe, whole, quiet=True)
    train_and_stop(recipe, tmp_path / "run", 3)
    fit(recipe, tmp_path / "run", quiet=True)
    assert any(row["event"] == "resume" for row in read_log(tmp_path / "run"))
    assert_same_models(tmp_path / "run", whole)
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.parametrize(("first", "then"), [("no", "pure_bf16"), ("pure_bf16", "no")])
def test_a_run_may_go_on_in_the_other_precision(
    resolve_small: Resolve, tmp_path: Path, first: str, then: str
) -> None:
    """From fp32 weights to bf16 ones or back, with a warning; what comes after is in the new."""
    of_first, of_then = (resolve_small(mixed_precision=precision) for precision in (first, then))
    train_and_stop(of_first, tmp_path / "run", 3)
    fit(of_then, tmp_path / "run", quiet=True)
    (resume,) = (row for row in read_log(tmp_path / "run") if row["event"] == "resume")
    assert resume["step"] == 2
    wanted = torch.bfloat16 if then == "pure_bf16" else torch.float32
    for tensors in final_weights(tmp_path / "run"):
        assert {tensor.dtype for tensor in tensors.values()} == {wanted}


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "hybrid"},
        {"objective": "classification"},
        {"objective": "masked_lm", "model": "roberta"},
        {"finetuning": "lora", "optimizer": "adafactor"},
    ],
    ids=["hybrid", "classification", "masked_lm", "lora"],
)
def test_every_objective_trains_in_bf16(
    bf16_run: Path, resolve_small: Resolve, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Trained, exported in bf16 and evaluated."""
    if changes.get("finetuning") == "lora":
        base = str(next(bf16_run.glob("class-0-*/final")))
        changes = {**changes, "model": base, "init": "pretrained", "tokenizer": "auto"}
    fit(resolve_small(**{**changes, "max_steps": 2}), tmp_path, quiet=True)
    for tensors in final_weights(tmp_path):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    evaluate_run(tmp_path, quiet=True)
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert 0 <= metrics["accuracy"] <= 1
