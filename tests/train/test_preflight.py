"""What cannot start says so before anything is loaded, with every way on."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.preflight import check_available


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty hub cache and an address where nobody answers."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_the_default_experiment_names_every_way_on() -> None:
    """gpt2 on imdb with neither weights nor data: one error, both sentences, all the options."""
    with pytest.raises(UserError, match="weights of gpt2") as error:
        check_available(TrainRecipe())
    for way in (
        "--init scratch",
        "--model gpt2-tiny --dataset docstrings",
        "ACCEL_GPT2_DATA",
        "ACCEL_GPT2_MODELS",
        "hf download openai-community/gpt2",
    ):
        assert way in str(error.value), way


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    """Pickled weights are not read, and the message says how to convert them."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no \*\.safetensors file"):
        check_available(TrainRecipe(model=str(model), dataset="docstrings"))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    """A path that does not exist is not looked up on the hub."""
    with pytest.raises(UserError, match="nowhere does not exist"):
        check_available(TrainRecipe(model=str(tmp_path / "nowhere"), dataset="docstrings"))


def test_what_is_there_passes(texts_file: Path) -> None:
    """A catalog model from scratch on a local file needs nothing else."""
    check_available(
        TrainRecipe(model="gpt2", init="scratch", dataset=str(texts_file), max_length=64)
    )


def test_a_tokenizer_that_is_nowhere_is_noticed(texts_file: Path, tmp_path: Path) -> None:
    """Random weights need none of roberta-base's files but its tokenizer, and that is the hub's."""
    scratch = TrainRecipe(
        model="roberta-base",
        init="scratch",
        objective="masked_lm",
        dataset=str(texts_file),
        max_length=64,
    )
    with pytest.raises(UserError, match="tokenizer FacebookAI/roberta-base is not on this machine"):
        check_available(scratch)
    check_available(dataclasses.replace(scratch, tokenizer="train"))
    with pytest.raises(UserError, match=f"{tmp_path} holds no tokenizer"):
        check_available(dataclasses.replace(scratch, tokenizer=str(tmp_path)))


def test_a_tokenizer_beside_missing_weights_is_not_asked_for_again(texts_file: Path) -> None:
    """One repository holds both: one sentence, and the hub is asked once."""
    with pytest.raises(UserError, match="weights of roberta-base are not") as error:
        check_available(
            TrainRecipe(model="roberta-base", objective="masked_lm", dataset=str(texts_file))
        )
    assert "tokenizer" not in str(error.value)


def test_asking_loads_no_torch() -> None:
    """The launcher asks too, and should not carry torch through a whole training."""
    code = "import sys, accel_gpt2.train.preflight; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
