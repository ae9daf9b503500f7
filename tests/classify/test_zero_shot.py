"""Zero-shot scores are a language model's likelihoods after a prompt, and nothing is trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from accel_gpt2.catalog.arms import ARMS
from accel_gpt2.catalog.datasets import DATASETS
from accel_gpt2.classify.zero_shot import evaluate_zero_shot, prompts, score_after_prompt
from accel_gpt2.data.tokenizer import load_gpt2_tokenizer
from accel_gpt2.recipe import Layer, TrainRecipe
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.processes import build_accelerator

CLASSES = ("kitchen", "orbit", "river")
POSITIONS = 24


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 24 positions as one would download it; its weights are random all the same."""
    directory = tmp_path_factory.mktemp("models") / "small-gpt2"
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": POSITIONS}
    model = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.5))
    model.save_pretrained(directory)
    load_gpt2_tokenizer().save(directory)
    return directory


def expected_score(model: Any, prompt: list[int], text: list[int], end: int) -> float:
    """The log-likelihood of text and EOS after BOS and prompt: one sequence, transformers alone."""
    ids = torch.tensor([[end, *prompt, *text, end]])
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)[0]
    scored = range(1 + len(prompt), ids.shape[1])
    return sum(log_p[position - 1, ids[0, position]].item() for position in scored)


def test_only_the_document_is_scored(model_directory: Path) -> None:
    """Batched scores of documents of all lengths, the empty one too, are transformers' own."""
    model = GPT2LMHeadModel.from_pretrained(model_directory).eval()
    tokenizer = load_gpt2_tokenizer()
    texts = ["a boat", "", "the old bridge near deep water and fish", "moon"]
    encoded = tokenizer.encode(texts, max_length=16)
    prompt = np.array([1212, 318, 257], dtype=np.int64)  # " This is a"

    class Documents:
        lengths = np.array([len(document.token_ids) for document in encoded])

        def document(self, index: int) -> Any:
            return encoded[index].token_ids

    scores = score_after_prompt(
        LanguageModel(model, loss_chunk_tokens=7),
        Documents(),
        prompt,
        micro_batch_tokens=20,
        accelerator=build_accelerator(TrainRecipe()),
    )
    end = tokenizer.eos_token_id
    for score, document in zip(scores, encoded, strict=True):
        text = document.token_ids[1:-1].tolist()
        assert score == pytest.approx(expected_score(model, prompt.tolist(), text, end), abs=1e-3)


@pytest.fixture(scope="module")
def evaluated(
    model_directory: Path,
    texts_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    session_cache: Path,
) -> Path:
    """A run directory with the evaluation of arm 2."""
    values = {"model": str(model_directory), "dataset": str(texts_file), "max_length": 20}
    recipe = resolve([Layer(origin="test", values=values)]).recipe
    run = tmp_path_factory.mktemp("runs") / "zero-shot"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
        evaluate_zero_shot(run, ARMS["2"], recipe, class_names=CLASSES, quiet=True)
    return run


def test_the_evaluation_follows_from_the_likelihoods(
    evaluated: Path, model_directory: Path, texts_file: Path
) -> None:
    """The table holds each class's likelihood after its own prompt, its argmax is the prediction
    under a uniform prior, and the metrics are of these predictions."""
    table = pq.read_table(evaluated / "evaluation" / "scores.parquet").to_pandas()
    scores = table[[f"log_likelihood_{index}" for index in range(3)]].to_numpy()
    assert (table["prediction"] == scores.argmax(axis=1)).all()
    metrics = json.loads((evaluated / "evaluation" / "metrics.json").read_text("utf-8"))
    assert metrics["accuracy"] == pytest.approx((table["prediction"] == table["label"]).mean())
    assert metrics["log_prior"] == pytest.approx([np.log(1 / 3)] * 3)
    assert metrics["training"]["seconds"] == 0

    tokenizer = load_gpt2_tokenizer()
    model = GPT2LMHeadModel.from_pretrained(model_directory).eval()
    lines = texts_file.read_text("utf-8").splitlines()[1:]
    row = int(table["num_tokens"].argmin())
    text = lines[int(table["document"][row])].split(",")[0]
    ids = tokenizer.encode([text], 64)[0].token_ids[1:-1].tolist()
    for prompt, score in zip(prompts(str(texts_file), CLASSES), scores[row], strict=True):
        asked = tokenizer.encode([prompt], 64)[0].token_ids[1:-1].tolist()
        expected = expected_score(model, asked, ids, tokenizer.eos_token_id)
        assert score == pytest.approx(expected, abs=1e-3)


def test_a_prompt_takes_its_room_from_the_document(evaluated: Path) -> None:
    """With 24 positions and prompts of at most 6 tokens, 20 tokens of a document do not fit."""
    table = pq.read_table(evaluated / "evaluation" / "scores.parquet").to_pandas()
    tokenizer = load_gpt2_tokenizer()
    longest = max(len(x.token_ids) - 2 for x in tokenizer.encode(list(prompts("", CLASSES)), 64))
    room = POSITIONS + 1 - longest
    assert room < 20
    assert table["num_tokens"].max() == room - 1
    assert table["truncated"].sum() > 0


def test_prompts_of_the_catalog() -> None:
    """Every known data set has a prompt for each class, and no two are alike."""
    assert len(DATASETS) >= 4
    for row in DATASETS.values():
        texts = prompts(row.name, row.class_names)
        assert len(set(texts)) == len(row.class_names) == len(texts)
    assert prompts("ag_news", DATASETS["ag_news"].class_names)[3].endswith(
        "science and technology:\n"
    )


def test_prompts_of_other_classes_say_their_names() -> None:
    """The plain words of a catalog row are for the row's own classes, in its own order."""
    assert prompts("sms_spam", ["spam", "ham"]) == (
        "This is a spam text message:\n",
        "This is a ham text message:\n",
    )
