"""The probe for the micro batch, with injected and with real want of memory."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from accel_gpt2.errors import DoesNotFitError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.backend import build_backend
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.memory import fitting_micro_batch_tokens
from accel_gpt2.train.model import build_model
from accel_gpt2.train.processes import build_accelerator

RECIPE = TrainRecipe(model="gpt2-tiny", init="scratch", max_length=512)


class Documents:
    """Equal documents, made when they are asked for."""

    def __init__(self, num_documents: int, length: int) -> None:
        self.lengths = np.full(num_documents, length)

    def document(self, index: int) -> np.ndarray:
        return np.full(self.lengths[index], 7)


def _model() -> LanguageModel:
    return build_model(RECIPE, vocab_size=300, eos_token_id=0)


def _limit_tokens(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    """Run out of memory, as torch says it, whenever more than `limit` tokens go through."""
    forward = LanguageModel.forward
    seen: list[int] = []

    def limited(self: LanguageModel, input_ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids.numel())
        if input_ids.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, input_ids, *rest)

    monkeypatch.setattr(LanguageModel, "forward", limited)
    return seen


def _probe(documents: Documents, tokens: int, model: LanguageModel | None = None) -> list[int]:
    """The micro batch that fits, and what was tried on the way to it."""
    halved: list[int] = []
    accelerator = build_accelerator(RECIPE)
    fitting = fitting_micro_batch_tokens(
        build_backend(accelerator, model or _model(), RECIPE),
        documents,
        micro_batch_tokens=tokens,
        reserved_bytes=1 << 20,
        accelerator=accelerator,
        on_halved=halved.append,
    )
    assert fitting == (halved[-1] if halved else tokens)
    return [tokens, *halved]


def test_what_fits_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over a full micro batch of the longest documents, and nothing is halved."""
    seen = _limit_tokens(monkeypatch, 10**9)
    assert _probe(Documents(50, 33), 256) == [256]
    assert seen == [256]


def test_it_halves_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try is at most half as large, down to what the memory holds."""
    seen = _limit_tokens(monkeypatch, 100)
    assert _probe(Documents(50, 33), 1024) == [1024, 512, 256, 128, 64]
    assert seen == [1024, 512, 256, 128, 64]


def test_few_documents_are_halved_by_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget far above what there is would be halved for nothing: each try is smaller."""
    seen = _limit_tokens(monkeypatch, 40)
    _probe(Documents(3, 33), 4096)
    assert seen == [96, 32]


def test_one_document_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3, with everything that could help."""
    _limit_tokens(monkeypatch, 10)
    with pytest.raises(DoesNotFitError, match=r"one document of 33 tokens; give --gradient-check"):
        _probe(Documents(50, 33), 128)


def test_other_failures_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in the model shows as itself."""

    def broken(*arguments: object) -> torch.Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(LanguageModel, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        _probe(Documents(50, 33), 128)


def test_the_probe_leaves_no_trace() -> None:
    """Random state, weights and gradients are as before it, so the first step is as without it."""
    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    _probe(Documents(50, 33), 128, model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_memory_that_really_runs_out(tmp_path: Path) -> None:
    """With a limit of the system on this process, torch's own failure is recognised and survived.

    In a forked process, which ends with what it found.
    """
    child = os.fork()
    if child == 0:
        try:
            allocated = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf(
                "SC_PAGE_SIZE"
            )
            limit = allocated + 400 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            tried = _probe(Documents(600, 513), 2**18)
            (tmp_path / "tried").write_text(" ".join(map(str, tried)))
        except BaseException as error:
            (tmp_path / "error").write_text(repr(error))
        os._exit(0)
    os.waitpid(child, 0)
    assert not (tmp_path / "error").exists(), (tmp_path / "error").read_text()
    tried = [int(tokens) for tokens in (tmp_path / "tried").read_text().split()]
    assert len(tried) > 1
    assert 512 <= tried[-1] < 2**17
