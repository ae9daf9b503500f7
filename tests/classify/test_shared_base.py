"""Runs whose classes' adapters are trained on one base, against runs of one class after another."""

import csv
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.predict import load_classifier
from accel_gpt2.classify.run import open_run
from accel_gpt2.classify.scores import InMemoryDocuments, Scorers, score_texts
from accel_gpt2.classify.status import read_classes
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import ResolvedRecipe
from accel_gpt2.train import model as model_module
from accel_gpt2.train.model import load_final
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.scoring import score_documents
from accel_gpt2.train.shared_base import StackedModels, StackTrial
from tests.conftest import write_texts

from .conftest import read_log, resolve_tiny
from .runs import assert_close_models, assert_same_models, losses, train_and_stop


def _placed(resolved: ResolvedRecipe, placement: str) -> ResolvedRecipe:
    recipe = dataclasses.replace(resolved.recipe, placement=placement)  # type: ignore[arg-type]
    return dataclasses.replace(resolved, recipe=recipe)


@pytest.fixture(scope="module")
def uneven_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 36, 30 and 20 documents: their trainings have other numbers of steps."""
    path = write_texts(tmp_path_factory.mktemp("texts") / "t.csv", documents_per_class=36)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    wanted = {"river": 36, "kitchen": 30, "orbit": 20}
    kept = [rows[0]]
    for text, label in rows[1:]:
        wanted[label] -= 1
        if wanted[label] >= 0:
            kept.append([text, label])
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(kept)
    return path


@pytest.fixture(scope="module")
def resolved(uneven_texts: Path, trained_run: Path) -> ResolvedRecipe:
    """Adapters with dropout on a tiny model that was trained before, in several micro batches."""
    return resolve_tiny(
        uneven_texts,
        model=str(next(trained_run.glob("class-0-*/final"))),
        init="pretrained",
        tokenizer="auto",
        finetuning="lora",
        lora_dropout=0.1,
        learning_rate=3e-3,
        micro_batch_tokens=80,
        gradient_checkpointing=True,
        checkpoint_every_steps=3,
    )


@pytest.fixture(scope="module")
def sequential(
    resolved: ResolvedRecipe, tmp_path_factory: pytest.TempPathFactory, session_cache: Path
) -> Path:
    """One class after another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
        run = tmp_path_factory.mktemp("runs") / "sequential"
        fit(_placed(resolved, "sequential"), run, quiet=True)
    return run


@pytest.fixture(scope="module")
def shared(
    resolved: ResolvedRecipe, tmp_path_factory: pytest.TempPathFactory, session_cache: Path
) -> Path:
    """All classes on one base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
        run = tmp_path_factory.mktemp("runs") / "shared"
        started = time.monotonic()
        fit(_placed(resolved, "shared-base"), run, quiet=True)
    (run.parent / "seconds").write_text(str(time.monotonic() - started))
    return run


def _same_checkpoints(run: Path, other: Path) -> int:
    """How many checkpoints two runs have, alike to the last bit in weights, moments and dice."""
    names = sorted(path.relative_to(run) for path in run.glob("class-*/checkpoint-*"))
    assert names == sorted(path.relative_to(other) for path in other.glob("class-*/checkpoint-*"))
    for name in names:
        for file in ("model.safetensors", "random-0.safetensors"):
            mine, its = load_file(run / name / file), load_file(other / name / file)
            assert mine.keys() == its.keys()
            assert all(torch.equal(mine[key], its[key]) for key in mine), name / file
        states = [
            torch.load(folder / name / "optimizer.pt", weights_only=True)["optimizer"]
            for folder in (run, other)
        ]
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    return len(names)


def test_it_is_bit_for_bit_one_class_after_another(shared: Path, sequential: Path) -> None:
    """With dropout, accumulation and checkpointing: the same models, checkpoints, losses, scores;
    and each class ended when its own steps were done."""
    assert_same_models(shared, sequential)
    assert losses(shared) == losses(sequential)
    assert _same_checkpoints(shared, sequential) == 6
    scores = sorted(shared.glob("class-*/validation_scores/*.npy"))
    assert len(scores) == 6
    for path in scores:
        expected = np.load(sequential / path.relative_to(shared))
        np.testing.assert_array_equal(np.load(path), expected)
    rows = read_log(shared)
    order = [row["class_index"] for row in rows if row["event"] == "step"]
    assert set(order[:6]) == {0, 1, 2}
    ends = [row["step"] for row in rows if row["event"] == "finish"]
    assert len(ends) == 3
    assert ends == sorted(ends)
    assert ends[0] < ends[-1]
    (choice,) = (row for row in rows if row["event"] == "shared_base")
    assert not choice["stacked"]
    assert "dropout" in choice["reason"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"finetuning": "qlora"}, id="qlora"),
        pytest.param({"use_dora": True, "lora_dropout": 0.0}, id="dora"),
        pytest.param({"objective": "masked_lm"}, id="masked_lm"),
    ],
)
def test_every_adapter_trains_as_it_does_alone(
    changes: dict[str, Any], resolved: ResolvedRecipe, tmp_path: Path
) -> None:
    """A quantised base, DoRA and masked language models: bit for bit, too."""
    if changes.get("finetuning") == "qlora":
        pytest.importorskip("bitsandbytes")
    recipe = dataclasses.replace(resolved.recipe, max_steps=2, **changes)
    if recipe.objective == "masked_lm":
        recipe = dataclasses.replace(recipe, model=str(_masked_base(resolved, tmp_path)))
    short = dataclasses.replace(resolved, recipe=recipe)
    for placement in ("sequential", "shared-base"):
        fit(_placed(short, placement), tmp_path / placement, quiet=True)
    assert len(losses(tmp_path / "shared-base")) == 6
    assert losses(tmp_path / "shared-base") == losses(tmp_path / "sequential")
    assert_same_models(tmp_path / "shared-base", tmp_path / "sequential")


def _masked_base(resolved: ResolvedRecipe, folder: Path) -> Path:
    """A masked language model of one step, and its tokenizer."""
    base = resolve_tiny(
        Path(resolved.recipe.dataset), model="roberta-tiny", objective="masked_lm", max_steps=1
    )
    fit(base, folder / "base", quiet=True)
    return next((folder / "base").glob("class-0-*/final"))


def test_each_class_counts_its_own_seconds(shared: Path) -> None:
    """Together they are at most what the run took, not that many times the number of classes."""
    seconds = [record.seconds for record in open_run(shared).training_records()]
    assert all(own > 0 for own in seconds)
    assert sum(seconds) < float((shared.parent / "seconds").read_text())


@pytest.mark.parametrize(
    ("first", "question", "then"),
    # At these questions all classes are on their way, or the first is finished and left out.
    [("shared-base", 14, "sequential"), ("sequential", 40, "shared-base")],
)
def test_a_run_goes_on_under_the_other_placement(
    first: str,
    question: int,
    then: str,
    resolved: ResolvedRecipe,
    sequential: Path,
    tmp_path: Path,
) -> None:
    """Stopped on the way and started again otherwise: bit for bit the run that was not."""
    run = tmp_path / "halves"
    train_and_stop(_placed(resolved, first), run, question)
    states = [status.state for status in read_classes(run)]
    with_checkpoint = {path.parent for path in run.glob("class-*/checkpoint-*")}
    if first == "shared-base":
        assert states == ["stopped", "stopped", "stopped"]
        assert len(with_checkpoint) == 3
    else:
        assert states == ["finished", "stopped", "waiting"]
    fit(_placed(resolved, then), run, quiet=True)
    assert_same_models(run, sequential)
    assert losses(run) == losses(sequential)


@pytest.fixture(scope="module")
def without_dropout(resolved: ResolvedRecipe) -> ResolvedRecipe:
    """What can be stacked; and AdamW that does not turn rounding into whole steps."""
    recipe = dataclasses.replace(
        resolved.recipe,
        dropout=0.0,
        lora_dropout=0.0,
        adam_epsilon=1e-5,
        micro_batch_tokens=1200,
        epochs=1.0,
    )
    return dataclasses.replace(resolved, recipe=recipe)


def test_stacked_it_is_the_same_up_to_rounding(
    without_dropout: ResolvedRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All classes in one batch, each dropping out at its end: the models are equal to 1e-6, and
    what was measured is said and logged."""
    fit(_placed(without_dropout, "sequential"), tmp_path / "sequential", quiet=True)
    monkeypatch.setattr(StackTrial, "is_faster", True)
    together: list[int] = []
    run = StackedModels.run

    def counting(self: StackedModels, micro_batches: Any) -> list[torch.Tensor]:
        together.append(len(micro_batches))
        return run(self, micro_batches)

    monkeypatch.setattr(StackedModels, "run", counting)
    fit(_placed(without_dropout, "shared-base"), tmp_path / "stacked", quiet=True)
    assert {1, 2, 3} <= set(together)
    assert_close_models(tmp_path / "stacked", tmp_path / "sequential", rtol=1e-6)
    for mine, its in zip(
        losses(tmp_path / "stacked"), losses(tmp_path / "sequential"), strict=True
    ):
        assert mine[:2] == its[:2]
        assert mine[2] == pytest.approx(its[2], rel=1e-6)
    (choice,) = (row for row in read_log(tmp_path / "stacked") if row["event"] == "shared_base")
    assert choice["stacked"]
    assert choice["in_turn_seconds"] > 0
    assert choice["stacked_seconds"] > 0


def test_a_class_that_fails_does_not_lose_the_others(
    resolved: ResolvedRecipe, sequential: Path, tmp_path: Path
) -> None:
    """The others are trained to their ends, then the run fails with that class's sentence, and a
    later start trains what is left."""
    run = tmp_path / "run"
    recipe = _placed(resolved, "shared-base")
    train_and_stop(recipe, run, 8)
    (failing,) = run.glob("class-1-*")
    in_the_way = failing / "validation_scores"
    in_the_way.write_text("not a folder")
    with pytest.raises(UserError, match="validation_scores"):
        fit(recipe, run, quiet=True)
    assert [status.state for status in read_classes(run)] == ["finished", "failed", "finished"]
    in_the_way.unlink()
    fit(recipe, run, quiet=True)
    assert_same_models(run, sequential)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"finetuning": "full"}, "only adapters leave the base as it is"),
        ({"objective": "unconditional"}, "there is one training for all classes"),
    ],
)
def test_what_has_no_base_to_share_is_refused(
    changes: dict[str, Any],
    words: str,
    resolved: ResolvedRecipe,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """One sentence, before a model is loaded."""
    monkeypatch.setattr(model_module, "build_model", None)
    recipe = dataclasses.replace(resolved.recipe, placement="shared-base", **changes)
    with pytest.raises(UsageError, match=words):
        fit(dataclasses.replace(resolved, recipe=recipe), tmp_path / "run", quiet=True)


def test_scoring_reads_the_base_once(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three adapters, one reading, and bit for bit the scores on a base read for each; the kept
    models of a classifier share it too."""
    run = open_run(shared)
    texts = ["the old boat", "some bread and very slowly some salt near", "a rocket"]
    read = model_module._read_weights
    num_read = 0

    def counting(*arguments: Any) -> Any:
        nonlocal num_read
        num_read += 1
        return read(*arguments)

    monkeypatch.setattr(model_module, "_read_weights", counting)
    accelerator = build_accelerator(run.recipe)
    together = score_texts(run, texts, accelerator).values
    assert num_read == 1
    documents = model_module.load_final_tokenizer(run.finals[0]).encode(texts, 48)
    for index, final in enumerate(run.finals):
        alone = score_documents(
            load_final(final, run.recipe),
            InMemoryDocuments(documents),
            micro_batch_tokens=run.recipe.micro_batch_tokens,
            accelerator=accelerator,
        )
        np.testing.assert_array_equal(together[:, index], alone)
    assert num_read == 4
    classifier = load_classifier(shared)
    found = classifier.predict(texts)
    assert num_read == 5
    for row, prediction in zip(together, found, strict=True):
        likelihoods = (prediction.log_likelihoods or {}).values()
        np.testing.assert_array_equal(row, list(likelihoods))
    scorers = Scorers(run)
    held = [scorers.load(index) for index in range(3)]
    frozen = [{p.data_ptr() for n, p in m.named_parameters() if "lora_" not in n} for m in held]
    own = [{p.data_ptr() for n, p in m.named_parameters() if "lora_" in n} for m in held]
    assert frozen[0] == frozen[1] == frozen[2]
    assert len(own[0] | own[1] | own[2]) == 3 * len(own[0]) > 0
