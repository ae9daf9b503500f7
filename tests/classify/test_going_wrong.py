"""Runs in which numbers or memory go wrong, time or money ends, and what is left of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.prepare import prepare_data
from accel_gpt2.classify.spending import read_ledger
from accel_gpt2.errors import DoesNotFitError, ExitCode, StoppedEarly, UserError
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.checkpoint import list_checkpoints
from accel_gpt2.train.manifest import verify

from .conftest import read_log, resolve_tiny

Forward = Callable[..., torch.Tensor]


def _change_forward(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    """Have every training loss go through `change(input_ids, loss)`."""
    forward = LanguageModel.forward

    def changed(self: LanguageModel, input_ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return change(input_ids, forward(self, input_ids, *rest))

    monkeypatch.setattr(LanguageModel, "forward", changed)


def test_a_document_that_gives_nan_is_skipped_and_named(
    texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step changes nothing, its row is written, and the run goes on to the end."""
    resolved = resolve_tiny(texts_file, epochs=1.0, micro_batch_tokens=1)
    data = prepare_data(resolved.recipe, progress=False)
    mine = data.train.for_class(0)
    longest = int(mine[data.train.lengths[mine].argmax()])
    bad = torch.from_numpy(data.train.document(longest)[:-1].astype("int64"))
    probed = False

    def change(ids: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        nonlocal probed
        if not probed:  # the probe for memory comes first, and its loss is of no interest
            probed = True
            return loss
        return loss * float("nan") if torch.equal(ids[0], bad) else loss

    _change_forward(monkeypatch, change)
    run = tmp_path / "run"
    fit(resolved, run, quiet=True)
    (record,) = [
        json.loads(line)
        for path in run.glob("class-0-*/nonfinite.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert record["step"] == 1
    assert record["micro_batches"] == [
        {"loss": "nan", "document_rows": [int(data.train.rows[longest])]}
    ]
    steps = [x for x in read_log(run) if x["event"] == "step" and x["class_index"] == 0]
    assert steps[0]["loss"] is None
    assert steps[0]["skipped_steps"] == 1
    assert all(x["loss"] > 0 for x in steps[1:])
    assert len(list(run.glob("class-*/final/model.safetensors"))) == 3


def test_weights_that_went_wrong_stop_the_run(
    texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three bad steps in a row end it with 1; the checkpoint before them is whole and goes on."""
    resolved = resolve_tiny(texts_file, checkpoint_every_steps=2)
    calls = 0

    def change(ids: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss * float("inf") if calls > 5 else loss  # one is the probe's

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        _change_forward(patch, change)
        with pytest.raises(UserError, match="of 3 steps in a row, up to step 7, are not finite"):
            fit(resolved, run, quiet=True)
    (directory,) = run.glob("class-0-*")
    assert len((directory / "nonfinite.jsonl").read_text().splitlines()) == 3
    newest = list_checkpoints(directory)[0]
    verify(newest)
    fit(resolved, run, quiet=True)
    assert len(list(run.glob("class-*/final/model.safetensors"))) == 3


def test_a_validation_without_likelihoods_is_not_saved(
    texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that go wrong between two evaluations are seen at the second, and named."""
    scored = LanguageModel.document_log_likelihoods

    def broken(self: LanguageModel, *tensors: torch.Tensor) -> torch.Tensor:
        return scored(self, *tensors) * float("nan")

    monkeypatch.setattr(LanguageModel, "document_log_likelihoods", broken)
    with pytest.raises(UserError, match=r"no finite likelihood .* row \d+ of the training split"):
        fit(resolve_tiny(texts_file), tmp_path / "run", quiet=True)
    assert not list((tmp_path / "run").glob("class-*/checkpoint-*"))


def _limit_tokens(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    forward = LanguageModel.forward

    def limited(self: LanguageModel, input_ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if input_ids.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, input_ids, *rest)

    monkeypatch.setattr(LanguageModel, "forward", limited)


def _weights(run: Path) -> list[dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    files = sorted(run.glob("class-*/final/model.safetensors"))
    assert len(files) == 3
    return [load_file(file) for file in files]


def test_out_of_memory_halves_the_micro_batch_and_not_the_result(
    texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged, said, in recipe.yaml and plan.json; and the model is that of the smaller batch."""
    options: dict[str, Any] = {"dropout": 0.0, "adam_epsilon": 1e-4}
    fit(resolve_tiny(texts_file, **options), tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        _limit_tokens(patch, 60)
        fit(resolve_tiny(texts_file, micro_batch_tokens=200, **options), tmp_path / "run")
    run = tmp_path / "run"
    halved = [row for row in read_log(run) if row["event"] == "micro_batch_halved"]
    assert halved
    assert {row["class_index"] for row in halved} == {0}  # the next class starts from what fits
    fitting = halved[-1]["micro_batch_tokens"]
    assert fitting <= 60
    assert yaml.safe_load((run / "recipe.yaml").read_text())["micro_batch_tokens"] == fitting
    assert json.loads((run / "plan.json").read_text())["micro_batch_tokens"] == fitting
    for mine, theirs in zip(_weights(run), _weights(tmp_path / "whole"), strict=True):
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_what_never_fits_is_refused_before_the_first_step(
    texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 3, and no checkpoint."""
    _limit_tokens(monkeypatch, 4)
    with pytest.raises(DoesNotFitError, match="one document") as refused:
        fit(resolve_tiny(texts_file), tmp_path / "run", quiet=True)
    assert refused.value.exit_code == ExitCode.DOES_NOT_FIT
    assert not list((tmp_path / "run").glob("class-*/checkpoint-*"))


def test_a_budget_is_for_all_starts(texts_file: Path, tmp_path: Path) -> None:
    """It saves and ends with 4; what earlier starts cost counts, and more money goes on."""
    run = tmp_path / "run"

    def start(run: Path = run, **limits: float) -> int:
        resolved = resolve_tiny(
            texts_file,
            epochs=50.0,
            price_usd_per_hour=3600.0,
            **limits,  # $1 a second
        )
        with pytest.raises(StoppedEarly, match=r"(budget|time limit) of .* is reached") as stopped:
            fit(resolved, run, quiet=True)
        assert stopped.value.exit_code == ExitCode.LIMIT_REACHED
        return len([row for row in read_log(run) if row["event"] == "step"])

    start(tmp_path / "before", max_time_seconds=0.001)  # imports take seconds the first time
    first = start(budget_usd=4.0)
    assert first > 0
    assert "- Paid for machines until now: $" in (run / "README.md").read_text()
    (spent,) = read_ledger(run)
    assert 1 < spent.seconds < 10
    assert start(budget_usd=4.0) == first  # spent already
    assert spent.seconds < read_ledger(run)[0].seconds
    assert start(budget_usd=1000.0, max_time_seconds=2.0) > first


@pytest.mark.parametrize("content", ["", "{}", '{"seconds": "many"}', "[1]"])
def test_a_damaged_record_of_what_was_spent_is_named(
    texts_file: Path, tmp_path: Path, content: str
) -> None:
    """A budget that cannot be kept is no budget."""
    (tmp_path / "spent.json").write_text(content)
    with pytest.raises(UserError, match=r"spent\.json cannot be read"):
        fit(resolve_tiny(texts_file), tmp_path, quiet=True)
