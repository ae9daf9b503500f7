"""The model rows agree with transformers."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from accel_gpt2.catalog.models import MODELS


def test_there_are_seven_models() -> None:
    """The parametrised test below sees every size that the documentation names."""
    assert set(MODELS) == {
        "gpt2-tiny",
        "gpt2-mini",
        "distilgpt2",
        "gpt2",
        "gpt2-medium",
        "gpt2-large",
        "gpt2-xl",
    }


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_as_transformers_builds_them(name: str) -> None:
    """The closed form equals GPT2LMHeadModel on the meta device, tied head counted once."""
    row = MODELS[name]
    config = GPT2Config(
        n_layer=row.n_layer,
        n_head=row.n_head,
        n_embd=row.n_embd,
        n_positions=row.n_positions,
        vocab_size=row.vocab_size,
    )
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    assert row.num_parameters == model.num_parameters()
