"""What only a GPU can show; `make gpu-check` runs it, and without a GPU it fails."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from accel_gpt2.classify.evaluate import evaluate_run
from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.side_by_side import WORTHWHILE
from accel_gpt2.classify.status import read_classes
from accel_gpt2.errors import StoppedEarly, UserError
from accel_gpt2.recipe import Layer
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.checkpoint import (
    Identity,
    TrainState,
    list_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from accel_gpt2.train.loss import halves_problem
from accel_gpt2.train.model import build_model
from accel_gpt2.train.optim import build_optimizer
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.scoring import score_documents
from accel_gpt2.train.stopping import StopRequest
from tests.classify.conftest import resolve_tiny
from tests.classify.test_objectives import OBJECTIVES


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail(f"torch {torch.__version__} sees no CUDA GPU here, and these tests are for one")


def _log(run: Path, event: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def _losses(run: Path) -> list[float]:
    last = {(row["class_index"], row["step"]): row["loss"] for row in _log(run, "step")}
    return [loss for _, loss in sorted(last.items())]


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed_precision: str
) -> None:
    """Losses and tensors, up to what the GPU's own sums in changing order allow."""
    resolved = resolve_tiny(texts_file, mixed_precision=mixed_precision)
    fit(resolved, tmp_path / "whole", quiet=True)
    ask = StopRequest.requested
    asked = 0

    def counting(self: StopRequest, device: torch.device) -> bool:
        nonlocal asked
        asked += 1
        if asked == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, device)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "requested", counting)
        with pytest.raises(StoppedEarly, match="SIGTERM"):
            fit(resolved, tmp_path / "run", quiet=True)
    newest = list_checkpoints(next((tmp_path / "run").glob("class-0-*")))[0]
    checkpoint = read_checkpoint(newest)
    assert "cuda" in checkpoint.random_states[0]
    assert (checkpoint.optimizer["scaler"] is not None) == (mixed_precision == "fp16")
    fit(resolved, tmp_path / "run", quiet=True)
    np.testing.assert_allclose(_losses(tmp_path / "run"), _losses(tmp_path / "whole"), rtol=2e-3)
    for path in sorted((tmp_path / "whole").glob("class-*/final/model.safetensors")):
        mine = load_file(tmp_path / "run" / path.relative_to(tmp_path / "whole"))
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(mine[name], tensor, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_and_scores_as_on_a_cpu(
    texts_file: Path, tmp_path: Path, name: str, mixed_precision: str
) -> None:
    """In 16 bits on the card: the losses of fp32 within its rounding, and scores that add up."""
    changes = {**OBJECTIVES[name], "dropout": 0.0, "max_steps": 6}
    resolved = resolve_tiny(texts_file, mixed_precision=mixed_precision, **changes)
    fit(resolved, tmp_path / "gpu", quiet=True)
    fit(resolve_tiny(texts_file, **changes), tmp_path / "fp32", quiet=True)
    np.testing.assert_allclose(_losses(tmp_path / "gpu"), _losses(tmp_path / "fp32"), rtol=0.05)
    if name != "unconditional":
        metrics = evaluate_run(tmp_path / "gpu", quiet=True)
        reference = evaluate_run(tmp_path / "fp32", quiet=True)
        assert metrics["raw"]["nll"] == pytest.approx(reference["raw"]["nll"], rel=0.2, abs=0.05)


def test_memory_that_runs_out_is_halved(texts_file: Path, tmp_path: Path) -> None:
    """With a real limit on the card: the run finds its micro batch and comes to its end."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 120 * 2**20) / total)
    try:
        resolved = resolve_tiny(
            texts_file, model="gpt2-mini", micro_batch_tokens=2**16, max_steps=2
        )
        fit(resolved, tmp_path / "run", quiet=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert _log(tmp_path / "run", "micro_batch_halved")
    assert len(list((tmp_path / "run").glob("class-*/final/model.safetensors"))) == 3


def test_a_collapsing_loss_scale_is_explained(
    texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients that overflow fp16 at any scale stop the run with the way out of it."""
    forward = LanguageModel.forward
    monkeypatch.setattr(
        LanguageModel, "forward", lambda self, *tensors: forward(self, *tensors) * 1e12
    )
    resolved = resolve_tiny(texts_file, mixed_precision="fp16", epochs=20.0)
    with pytest.raises(UserError, match=r"fp16's loss scale fell to 0\.5 .*bf16"):
        fit(resolved, tmp_path / "run", quiet=True)


def test_a_class_on_each_gpu_is_what_one_after_another_is(texts_file: Path, tmp_path: Path) -> None:
    """Three classes on two cards, each child seeing one: the losses of one card."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: a class on each of several cannot be seen")
    changes: dict[str, Any] = {"mixed_precision": "bf16", "profile": "auto"}
    fit(resolve_tiny(texts_file, **changes), tmp_path / "alone", quiet=True)
    fit(resolve_tiny(texts_file, placement="per-gpu", **changes), tmp_path / "placed", quiet=True)
    np.testing.assert_allclose(_losses(tmp_path / "placed"), _losses(tmp_path / "alone"), rtol=2e-3)
    processes = {status.process for status in read_classes(tmp_path / "placed")}
    assert len(processes) == 3


def test_side_by_side_on_one_gpu_is_measured(
    texts_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether it is kept or given up, by the speed on this card, the models are trained."""
    resolved = resolve_tiny(
        texts_file,
        placement="concurrent",
        model="gpt2-mini",
        mixed_precision="bf16",
        epochs=400.0,  # longer than the others take to start
    )
    fit(resolved, tmp_path / "run", quiet=True)
    found = re.search(
        r"training is (\d+\.\d\d) times as fast as one after another(: it goes on so|, less than)",
        capfd.readouterr().err,
    )
    assert found is not None
    speedup, verdict = float(found[1]), found[2]
    assert (speedup >= WORTHWHILE) == (verdict == ": it goes on so")
    assert {status.state for status in read_classes(tmp_path / "run")} == {"finished"}


def test_evaluating_and_saving_stay_below_training(tmp_path: Path) -> None:
    """torch's own peak, with a 124M model: a training step, then an evaluation, then a save."""
    recipe = resolve(
        [
            Layer(
                origin="test",
                values={"model": "gpt2", "init": "scratch", "mixed_precision": "bf16"},
            )
        ]
    ).recipe
    accelerator = build_accelerator(recipe)
    model = build_model(recipe, vocab_size=50257, eos_token_id=50256).to(accelerator.device)
    optimizer = build_optimizer(model, recipe)
    ids = torch.full((4, 1023), 7, device=accelerator.device)

    class Documents:
        lengths = np.full(4, 1024)

        def document(self, index: int) -> np.ndarray:
            return np.full(1024, 7)

    def peak(work: Any) -> int:
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()

    def train() -> None:
        with accelerator.autocast():
            loss = model(ids, ids.flatten(), torch.arange(ids.numel(), device=ids.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    identity = Identity(
        class_index=0, class_name="a", data_fingerprint="d", tokenizer_fingerprint="t", recipe={}
    )
    train()
    training = peak(train)
    evaluating = peak(
        lambda: score_documents(
            model, Documents(), micro_batch_tokens=4096, accelerator=accelerator
        )
    )
    saving = peak(
        lambda: save_checkpoint(
            tmp_path,
            state=TrainState(step=1),
            identity=identity,
            weights=model.trainable_state(),
            optimizer={"optimizer": optimizer.state_dict(), "scaler": None},
            random_states=[{"cpu": torch.get_rng_state()}],
        )
    )
    assert evaluating < training
    assert saving < training


def test_products_of_halves_are_as_good_as_fp32() -> None:
    """Where scores are made of them, and on other GPUs that have bf16 as well."""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        assert halves_problem(torch.device("cuda")) is None
