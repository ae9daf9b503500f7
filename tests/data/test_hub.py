"""The hub is asked briefly, whatever it does."""

import socket
import time
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from accel_gpt2.data import hub as data_hub
from accel_gpt2.data.hub import HubAnswer, ask_hub, why_unreachable
from accel_gpt2.data.sources import check_data_available
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe


def _use_endpoint(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(data_hub, "HfApi", lambda: HfApi(endpoint=address))


def test_found_and_missing(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub has is found; what it has not, and what is no name at all, is missing."""
    _use_endpoint(monkeypatch, hub("me/pets", {}))
    names = ("me/pets", "me/none", "no/such/name")
    answers = [ask_hub(name, "dataset") for name in names]
    assert answers == [HubAnswer.FOUND, HubAnswer.MISSING, HubAnswer.MISSING]


def test_a_hub_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is accepted and then silent is given up after the time limit."""
    monkeypatch.setattr(data_hub, "_PATIENCE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        _use_endpoint(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}")
        started = time.perf_counter()
        assert ask_hub("me/pets", "dataset") is HubAnswer.UNREACHABLE
        assert time.perf_counter() - started < 3


def test_offline_mode_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE the sentence says that the hub was not asked, and names the ways on."""
    assert why_unreachable() == "does not answer"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("ACCEL_GPT2_DATA", ".")
    message = (
        r"nor under ACCEL_GPT2_DATA=\..*would be nobody/imbd, is not asked \(HF_HUB_OFFLINE is "
        r"set\).*--model gpt2-tiny --dataset docstrings"
    )
    with pytest.raises(UserError, match=message):
        check_data_available(TrainRecipe(dataset="nobody/imbd"))
    with pytest.raises(UserError, match=r"Did you mean 'imdb'\?"):
        check_data_available(TrainRecipe(dataset="imbd"))
