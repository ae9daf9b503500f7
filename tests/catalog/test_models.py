"""The model rows agree with transformers."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM

from accel_gpt2.catalog.models import MODELS


def test_there_are_eleven_models() -> None:
    """The parametrised test below sees every size that the documentation names."""
    assert set(MODELS) == {
        "gpt2-tiny",
        "gpt2-mini",
        "distilgpt2",
        "gpt2",
        "gpt2-medium",
        "gpt2-large",
        "gpt2-xl",
        "roberta-tiny",
        "distilroberta-base",
        "roberta-base",
        "roberta-large",
    }


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_as_transformers_builds_them(name: str) -> None:
    """The closed form equals transformers' language model on the meta device, tied head once."""
    row = MODELS[name]
    with torch.device("meta"):
        if row.model_type == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    n_layer=row.n_layer,
                    n_head=row.n_head,
                    n_embd=row.n_embd,
                    n_positions=row.n_positions,
                    vocab_size=row.vocab_size,
                )
            )
        else:
            model = RobertaForMaskedLM(
                RobertaConfig(
                    num_hidden_layers=row.n_layer,
                    num_attention_heads=row.n_head,
                    hidden_size=row.n_embd,
                    intermediate_size=4 * row.n_embd,
                    max_position_embeddings=row.n_positions + 2,
                    vocab_size=row.vocab_size,
                    type_vocab_size=1,
                )
            )
    assert row.num_parameters == model.num_parameters()
