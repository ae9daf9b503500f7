"""What else the loop trains: losses and scores against transformers, torch and brute force."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.classifier import DocumentClassifier
from accel_gpt2.train.hybrid import HybridLanguageModels
from accel_gpt2.train.loss import chunked_cross_entropy
from accel_gpt2.train.masked import MaskedLanguageModel, PllEstimator
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import TrainedModel, to_device
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.scoring import score_documents

VOCAB_SIZE, EOS, PAD, MASK = 97, 0, 1, 2
CLASSES = ("ham", "eggs", "spam")
CPU = torch.device("cpu")
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}


def _documents(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [
        np.concatenate([[EOS], random.integers(3, VOCAB_SIZE, length - 2), [EOS]])
        for length in lengths
    ]


DOCUMENTS = _documents(5, 31, 9, 17, 3)
LABELS = np.array([0, 2, 1, 1, 0])


def _directory(folder: Path, family: str) -> Path:
    """A model's directory without weights: its configuration."""
    heads = {"num_attention_heads": 2}
    config = {
        "gpt2": lambda: GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64),
        "llama": lambda: LlamaConfig(
            **SIZES, **heads, num_key_value_heads=1, max_position_embeddings=64
        ),
        "roberta": lambda: RobertaConfig(
            **SIZES, **heads, max_position_embeddings=66, pad_token_id=PAD, type_vocab_size=1
        ),
    }[family]()
    config.vocab_size = VOCAB_SIZE
    config.save_pretrained(folder / family)
    return folder / family


def _build(folder: Path, family: str, objective: Any, **changes: Any) -> TrainedModel:
    values: dict[str, Any] = {
        "model": str(_directory(folder, family)),
        "objective": objective,
        "init": "scratch",
        "dropout": 0.0,
        "max_length": 64,
        "loss_chunk_tokens": 7,
        "micro_batch_tokens": 64,
        **changes,
    }
    return build_model(
        TrainRecipe(**values),
        vocab_size=VOCAB_SIZE,
        eos_token_id=EOS,
        mask_token_id=MASK,
        pad_token_id=PAD,
        class_names=CLASSES,
        log_prior=np.log([0.5, 0.3, 0.2]),
        mean_tokens=12.0,
    )


def _batch(model: TrainedModel, documents: list[np.ndarray], labels: np.ndarray) -> Any:
    return to_device(model.collate(documents, labels, epoch=0), CPU)


@pytest.mark.parametrize("family", ["gpt2", "llama", "roberta"])
def test_classifier_is_transformers_own(family: str, tmp_path: Path) -> None:
    """Exported and loaded by plain transformers, padded as its tokenizers pad, it says the same."""
    model = _build(tmp_path, family, "classification")
    assert isinstance(model, DocumentClassifier)
    model.save_pretrained(tmp_path / "final")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    assert plain.config.id2label == dict(enumerate(CLASSES))
    longest = max(map(len, DOCUMENTS))
    pad = plain.config.pad_token_id
    padded = torch.tensor([[*x, *[pad] * (longest - len(x))] for x in DOCUMENTS])
    mask = torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x in DOCUMENTS])
    logits = plain(input_ids=padded, attention_mask=mask).logits
    scores = model.eval().score(DOCUMENTS, CPU)
    torch.testing.assert_close(scores, logits.double().log_softmax(-1), atol=1e-5, rtol=1e-5)
    loss = model(*_batch(model, DOCUMENTS, LABELS))
    expected = F.cross_entropy(logits, torch.from_numpy(LABELS), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_masked_loss_is_transformers_own(tmp_path: Path) -> None:
    """The sum over masked tokens equals the library's mean times their number."""
    model = _build(tmp_path, "roberta", "masked_lm", mask_fraction=0.3).eval()
    assert isinstance(model, MaskedLanguageModel)
    input_ids, targets, attention, masked = _batch(model, DOCUMENTS, LABELS)
    counts = model.num_targets(np.array([len(x) for x in DOCUMENTS]))
    assert masked.sum(dim=1).tolist() == counts.tolist() == [1, 9, 2, 4, 1]
    assert (input_ids[masked] == MASK).all()
    for document, row, chosen in zip(DOCUMENTS, targets, masked, strict=True):
        assert row[: len(document)].tolist() == document.tolist()
        assert not chosen[0], "BOS stays"
        assert not chosen[len(document) - 1 :].any(), "EOS and padding stay"
    labels = torch.where(masked, targets, -100)
    output = model.transformers_model(input_ids=input_ids, attention_mask=attention, labels=labels)
    loss = model(input_ids, targets, attention, masked)
    torch.testing.assert_close(loss, output.loss * int(masked.sum()), rtol=1e-5, atol=1e-4)


def test_masks_change_with_the_epoch_and_nothing_else(tmp_path: Path) -> None:
    """A resumed run and one on more processes see the masks that an uninterrupted one sees."""
    model = _build(tmp_path, "roberta", "masked_lm")
    first = model.collate(DOCUMENTS, LABELS, epoch=0)[3]
    alone = [model.collate([document], LABELS[:1], epoch=0)[3] for document in DOCUMENTS]
    for row, own in zip(first, alone, strict=True):
        assert np.array_equal(row[: own.shape[1]], own[0])
    assert not np.array_equal(first, model.collate(DOCUMENTS, LABELS, epoch=1)[3])


def test_full_pseudo_log_likelihood_masks_each_token_once(tmp_path: Path) -> None:
    """Brute force: one pass of plain transformers for each token between BOS and EOS."""
    model = _build(tmp_path, "roberta", "masked_lm").eval()
    assert isinstance(model, MaskedLanguageModel)
    model.estimator = PllEstimator()
    expected = []
    for document in DOCUMENTS:
        total = 0.0
        for position in range(1, len(document) - 1):
            ids = torch.from_numpy(document)[None].clone()
            ids[0, position] = MASK
            logits = model.transformers_model(input_ids=ids).logits[0, position]
            total += float(logits.log_softmax(-1)[document[position]])
        expected.append(total)
    np.testing.assert_allclose(model.score(DOCUMENTS, CPU), expected, rtol=1e-5)


def test_scores_under_autocast_have_an_fp32_head(tmp_path: Path) -> None:
    """As with causal models: a score is a sum over tokens, and logits in bf16 have large steps."""
    model = _build(tmp_path, "roberta", "masked_lm").eval()
    assert isinstance(model, MaskedLanguageModel)
    types = []
    model.transformers_model.lm_head.register_forward_hook(
        lambda *call: types.append(call[2].dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.score(DOCUMENTS[:1], CPU)
        model(*_batch(model, DOCUMENTS[:1], LABELS[:1]))
    assert types == [torch.float32, torch.bfloat16]


def test_estimates_share_masks_between_classes_or_do_not(tmp_path: Path) -> None:
    """Shared masks are the document's, independent ones the class's too; both repeat."""
    shared, independent = (
        [PllEstimator(kind=kind, class_index=index).masks(DOCUMENTS[1])[0] for index in (0, 0, 1)]
        for kind in ("shared", "independent")
    )
    assert np.array_equal(shared[0], shared[2])
    assert np.array_equal(independent[0], independent[1])
    assert not np.array_equal(independent[0], independent[2])


def test_estimate_of_single_masks_tends_to_the_full_value(tmp_path: Path) -> None:
    """Where one token is masked at a time, the mean over many draws is the full sum."""
    model = _build(tmp_path, "roberta", "masked_lm").eval()
    assert isinstance(model, MaskedLanguageModel)
    for parameter in model.parameters():  # far from uniform, so that tokens differ
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    document = DOCUMENTS[2:3]
    model.estimator = PllEstimator()
    full = float(model.score(document, CPU))
    model.estimator = PllEstimator(kind="shared", mask_fraction=0.01, num_samples=600)
    estimate = float(model.score(document, CPU))
    one = PllEstimator(kind="shared", mask_fraction=0.01)
    model.estimator = one
    assert estimate == pytest.approx(full, rel=0.05)
    assert float(model.score(document, CPU)) != pytest.approx(full, rel=0.05)


def _reference_hybrid_loss(model: HybridLanguageModels, weight: float) -> torch.Tensor:
    """GeDi's loss from whole logits, document by document."""
    total = torch.zeros((), dtype=torch.float64)
    for document, label in zip(DOCUMENTS, LABELS, strict=True):
        ids = torch.from_numpy(document)[None]
        likelihoods = torch.stack(
            [
                final.transformers_model(input_ids=ids[:, :-1])
                .logits.log_softmax(-1)
                .gather(2, ids[:, 1:, None])
                .double()
                .sum()
                for final in model.finals
            ]
        )
        means = likelihoods / (len(document) - 1)
        logits = model.log_scale.double().exp() * means + torch.log(torch.tensor([0.5, 0.3, 0.2]))
        discriminative = -logits.log_softmax(0)[label]
        total = total - (1 - weight) * likelihoods[label] + weight * 12.0 * discriminative
    return total


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_hybrid_loss_and_gradients_are_those_of_whole_logits(weight: float, tmp_path: Path) -> None:
    """The two passes over chunks give the loss and every gradient that autograd gives."""
    model = _build(tmp_path, "gpt2", "hybrid", discriminative_weight=weight)
    assert isinstance(model, HybridLanguageModels)
    for index, final in enumerate(model.finals):  # they start alike, which would hide a mix-up
        for parameter in final.parameters():
            torch.nn.init.normal_(
                parameter, std=0.2, generator=torch.Generator().manual_seed(index)
            )
    loss = model(*_batch(model, DOCUMENTS, LABELS))
    loss.backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    expected = _reference_hybrid_loss(model, weight)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    for (name, parameter), gradient in zip(model.named_parameters(), ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=2e-4, atol=2e-4, msg=name)


def test_hybrid_validation_is_its_training_loss(tmp_path: Path) -> None:
    """The loss that chooses the best checkpoint is the one that is trained, in bits per token."""
    model = _build(tmp_path, "gpt2", "hybrid", discriminative_weight=0.3).eval()
    scores = model.score(DOCUMENTS, CPU).numpy()
    lengths = np.array([len(x) for x in DOCUMENTS], dtype=np.int32)
    documents = TokenizedDocuments(
        tokens=np.concatenate(DOCUMENTS),
        offsets=np.cumsum(lengths) - lengths,
        lengths=lengths,
        labels=LABELS,
        num_bytes=lengths.astype(np.int64),
        rows=np.arange(len(lengths)),
        truncated=np.zeros(len(lengths), dtype=bool),
    )
    found = model.validation(scores, documents, np.arange(len(lengths)))
    nats = float(model(*_batch(model, DOCUMENTS, LABELS)))
    assert found.loss_bits == pytest.approx(nats / np.log(2) / (lengths - 1).sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        ("gpt2", "generative"),
        ("gpt2", "hybrid"),
        ("gpt2", "classification"),
        ("roberta", "classification"),
        ("roberta", "masked_lm"),
    ],
)
def test_scores_do_not_depend_on_the_batch(family: str, objective: str, tmp_path: Path) -> None:
    """One document at a time, or all together in one padded batch."""

    class Documents:
        lengths = np.array([len(x) for x in DOCUMENTS])

        def document(self, index: int) -> np.ndarray:
            return DOCUMENTS[index]

    model = _build(tmp_path, family, objective)
    accelerator = build_accelerator(TrainRecipe(trackers=()))
    alone, together = (
        score_documents(model, Documents(), micro_batch_tokens=tokens, accelerator=accelerator)
        for tokens in (1, 9999)
    )
    assert alone.shape == (len(DOCUMENTS), *model.score_shape)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        ("gpt2", "hybrid"),
        ("gpt2", "classification"),
        ("roberta", "classification"),
        ("roberta", "masked_lm"),
    ],
)
def test_a_rank_without_documents_takes_part(family: str, objective: str, tmp_path: Path) -> None:
    """Its loss is zero, and every parameter has a gradient, which is zero."""
    model = _build(tmp_path, family, objective)
    loss = model(*_batch(model, [], np.zeros(0, dtype=np.int64)))
    assert loss.item() == 0.0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_token_scores_add_up_to_the_document(tmp_path: Path) -> None:
    """What is kept of single tokens is what the document's score sums, in the documents' order."""

    class Documents:
        lengths = np.array([len(x) for x in DOCUMENTS])

        def document(self, index: int) -> np.ndarray:
            return DOCUMENTS[index]

    model = _build(tmp_path, "gpt2", "generative")
    flat = np.zeros(int((Documents.lengths - 1).sum()), dtype=np.float32)
    scores = score_documents(
        model,
        Documents(),
        micro_batch_tokens=40,
        accelerator=build_accelerator(TrainRecipe(trackers=())),
        token_scores=flat,
    )
    starts = np.cumsum(Documents.lengths - 1) - (Documents.lengths - 1)
    np.testing.assert_allclose(np.add.reduceat(flat.astype(np.float64), starts), scores, rtol=1e-6)
    assert isinstance(model, LanguageModel)
    plain = model.transformers_model(input_ids=torch.from_numpy(DOCUMENTS[1])[None]).logits
    expected = plain[0, :-1].log_softmax(-1).gather(1, torch.from_numpy(DOCUMENTS[1])[1:, None])
    found = flat[starts[1] : starts[1] + len(DOCUMENTS[1]) - 1]
    np.testing.assert_allclose(found, expected[:, 0].detach(), atol=1e-4)


def test_weighted_rows_equal_torchs() -> None:
    """Value and gradients of the chunked loss with a weight for each row."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 8, generator=generator) for n in (20, 11))
    targets = torch.randint(11, (20,), generator=generator)
    weights = torch.randn(20, generator=generator)
    ours, theirs = (
        [x.clone().requires_grad_() for x in (hidden, head)],
        [x.clone().requires_grad_() for x in (hidden, head)],
    )
    loss = chunked_cross_entropy(*ours, None, targets, 7, row_weights=weights)
    expected = (weights * F.cross_entropy(F.linear(*theirs), targets, reduction="none")).sum()
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-4, atol=1e-5)


def test_a_model_that_looks_ahead_is_no_language_model(tmp_path: Path) -> None:
    """RoBERTa loads as a causal LM and sees what it predicts: its likelihoods are none."""
    with pytest.raises(UserError, match="sees the tokens to the right of the one that it predicts"):
        _build(tmp_path, "roberta", "generative", max_length=60)


def test_an_encoders_positions_are_counted(tmp_path: Path) -> None:
    """RoBERTa's 66 positions begin behind the padding token's id: 64 tokens, not 66."""
    _build(tmp_path, "roberta", "classification", max_length=64)
    with pytest.raises(UsageError, match="give --max-length 64 or less"):
        _build(tmp_path, "roberta", "classification", max_length=65)


def test_a_tokenizer_without_a_mask_cannot_train_a_masked_model(tmp_path: Path) -> None:
    """The sentence names what is missing."""
    recipe = TrainRecipe(
        model=str(_directory(tmp_path, "roberta")),
        objective="masked_lm",
        init="scratch",
        max_length=64,
    )
    with pytest.raises(UserError, match="needs a tokenizer with a mask token"):
        build_model(recipe, vocab_size=VOCAB_SIZE, eos_token_id=EOS, pad_token_id=PAD)


@pytest.mark.parametrize(
    ("family", "objective", "auto_class"),
    [
        ("gpt2", "classification", AutoModelForCausalLM),
        ("roberta", "masked_lm", AutoModelForMaskedLM),
        ("gpt2", "generative", AutoModelForCausalLM),
    ],
)
def test_adapters_of_every_objective(
    family: str, objective: str, auto_class: Any, tmp_path: Path
) -> None:
    """LoRA trains adapters (and a new head); the base stays, and the export holds no base."""
    base = tmp_path / "base"
    auto_class.from_config(
        type(_build(tmp_path, family, objective).transformers_model.config).from_pretrained(
            _directory(tmp_path, family)
        )
    ).save_pretrained(base)
    model = _build(
        tmp_path, family, objective, model=str(base), init="pretrained", finetuning="lora"
    )
    trained = model.trainable_state()
    assert any("lora_A" in name for name in trained)
    head = [name for name in trained if "lora_" not in name]
    assert bool(head) == (objective == "classification"), head
    model(*_batch(model, DOCUMENTS, LABELS)).backward()
    (final,) = model.finals
    final.save_pretrained(tmp_path / "final")
    assert (tmp_path / "final" / "adapter_model.safetensors").stat().st_size < 200_000
