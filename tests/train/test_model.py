"""Models: every family that transformers loads, padding that never leaks, LoRA on Conv1D."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel_gpt2.data.batching import collate
from accel_gpt2.data.weights import weights_location
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.causal import LanguageModel, arrays
from accel_gpt2.train.model import build_model
from accel_gpt2.train.optim import build_optimizer, learning_rate_at
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.scoring import score_documents

VOCAB_SIZE = 97


def _tiny_config(family: str) -> Any:
    from transformers import GPT2Config, GPTJConfig, GPTNeoXConfig, LlamaConfig

    configs = {
        "gpt2": lambda: GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64),
        "gptj": lambda: GPTJConfig(n_layer=2, n_head=2, n_embd=32, n_positions=64, rotary_dim=8),
        "gpt_neox": lambda: GPTNeoXConfig(
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_size=32,
            intermediate_size=64,
            max_position_embeddings=64,
        ),
        "llama": lambda: LlamaConfig(
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            hidden_size=32,
            intermediate_size=64,
            max_position_embeddings=64,
        ),
    }
    config = configs[family]()
    config.vocab_size = VOCAB_SIZE
    config.bos_token_id = config.eos_token_id = 0
    return config


@pytest.fixture(params=["gpt2", "gptj", "gpt_neox", "llama"])
def pretrained(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with a tiny random model of one family, as `save_pretrained` leaves it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_tiny_config(request.param))
    model.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


class _Documents:
    def __init__(self, lengths: list[int]) -> None:
        random = np.random.default_rng(0)
        self._documents = [random.integers(1, VOCAB_SIZE, size=length) for length in lengths]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(document) for document in self._documents])

    def document(self, index: int) -> np.ndarray:
        return self._documents[index]


def _recipe(model: Path, **changes: Any) -> TrainRecipe:
    values: dict[str, Any] = {"dropout": 0.0, "max_length": 64, "loss_chunk_tokens": 16, **changes}
    return TrainRecipe(model=str(model), **values)


def _build(recipe: TrainRecipe) -> LanguageModel:
    return build_model(recipe, vocab_size=VOCAB_SIZE, eos_token_id=0)


def test_scores_are_transformers_own_whatever_the_batch(pretrained: Path) -> None:
    """Neither batch size nor padding changes a score; transformers' own loss is the reference."""
    documents = _Documents([4, 31, 9, 17, 50, 2])
    recipe = _recipe(pretrained)
    model = _build(recipe)
    accelerator = build_accelerator(recipe)
    alone = score_documents(model, documents, micro_batch_tokens=1, accelerator=accelerator)
    together = score_documents(model, documents, micro_batch_tokens=999, accelerator=accelerator)
    np.testing.assert_allclose(together, alone, atol=1e-4)
    base = model.transformers_model.eval()
    for index, length in enumerate(documents.lengths):
        ids = torch.from_numpy(documents.document(index))[None]
        loss = base(input_ids=ids, labels=ids).loss.item()
        assert alone[index] == pytest.approx(-loss * (length - 1), rel=1e-5)


def test_scores_of_many_batches_come_to_their_documents(pretrained: Path) -> None:
    """Scores wait on the device for those of later batches, and so do their tokens'."""
    documents = _Documents([3 + number % 30 for number in range(40)])
    recipe = _recipe(pretrained)
    model, accelerator = _build(recipe), build_accelerator(recipe)
    num_targets = documents.lengths - 1
    per_token = np.zeros(num_targets.sum(), dtype=np.float32)
    scores = score_documents(
        model, documents, micro_batch_tokens=1, accelerator=accelerator, token_scores=per_token
    )
    sums = np.add.reduceat(per_token.astype(np.float64), np.cumsum(num_targets) - num_targets)
    np.testing.assert_allclose(sums, scores, rtol=1e-6)
    model.eval()
    expected = [model.score([documents.document(i)], torch.device("cpu")) for i in range(40)]
    np.testing.assert_allclose(scores, torch.cat(expected), rtol=1e-6)


def test_what_follows_a_document_never_reaches_it(pretrained: Path) -> None:
    """Replacing the padding by other tokens leaves the loss as it is."""
    model = _build(_recipe(pretrained)).eval()
    batch = collate([np.arange(1, 20), np.arange(1, 6)])
    tensors = [torch.from_numpy(x) for x in arrays(batch)]
    before = model(*tensors).item()
    tensors[0] = torch.where(torch.from_numpy(batch.valid), tensors[0], torch.tensor(13))
    assert model(*tensors).item() == pytest.approx(before, abs=1e-4)


def test_lora_trains_every_projection_and_only_adapters(pretrained: Path) -> None:
    """Each block's linear layers get an adapter; after a step base weights are as they were."""
    recipe = _recipe(pretrained, finetuning="lora", lora_rank=4)
    model = _build(recipe)
    trained = model.trainable_state()
    assert trained
    assert all("lora_" in name for name in trained)
    if pretrained.name == "gpt2":
        blocks = model.transformers_model.config.n_layer
        # c_attn, attn.c_proj, c_fc, mlp.c_proj: an A and a B each.
        assert len(trained) == blocks * 4 * 2
    frozen = {
        name: p.detach().clone()
        for name, p in model.model.named_parameters()
        if not p.requires_grad
    }
    optimizer = build_optimizer(model, recipe)
    batch = collate([np.arange(1, 20), np.arange(1, 6)])
    tensors = [torch.from_numpy(x) for x in arrays(batch)]
    for _ in range(2):  # at the first step A gets no gradient, since B is zero
        model(*tensors).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    for name, parameter in model.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(pretrained: Path, finetuning: Any) -> None:
    """With and without recomputation the gradients are equal, adapters included."""
    batch = collate([np.arange(1, 20), np.arange(1, 6)])
    tensors = [torch.from_numpy(x) for x in arrays(batch)]
    gradients = []
    for checkpointing in (False, True):
        recipe = _recipe(pretrained, finetuning=finetuning, gradient_checkpointing=checkpointing)
        model = _build(recipe).train()
        if finetuning == "lora":  # B starts at zero, which would make A's gradient zero as well
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.constant_(parameter, 0.1)
        model(*tensors).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    without, with_checkpointing = gradients
    assert without.keys() == with_checkpointing.keys()
    for name, gradient in without.items():
        torch.testing.assert_close(with_checkpointing[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_so_many_blocks_are_checkpointed(pretrained: Path, num_layers: int) -> None:
    """The first ones run again in the backward pass, the others do not; gradients are the same."""
    tensors = [torch.from_numpy(x) for x in _batch()]
    plain = _build(_recipe(pretrained)).train()
    plain(*tensors).backward()
    recipe = _recipe(pretrained, gradient_checkpointing=True, checkpointed_layers=num_layers)
    model = _build(recipe).train()
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]
    assert len(blocks) == 2
    runs = [0, 0]
    for index, block in enumerate(blocks):
        norm = next(x for x in block.modules() if "Norm" in type(x).__name__)

        def count(*_: Any, index: int = index) -> None:
            runs[index] += 1

        norm.register_forward_hook(count)
    model(*tensors).backward()
    assert runs == [2 if index < num_layers else 1 for index in range(2)]
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_more_blocks_than_there_are_cannot_be_checkpointed(pretrained: Path) -> None:
    """A number from another model is an error and not all blocks."""
    recipe = _recipe(pretrained, gradient_checkpointing=True, checkpointed_layers=3)
    with pytest.raises(UsageError, match=r"checkpointed_layers = 3: .* has 2 blocks .* or less"):
        _build(recipe)


def test_dora_starts_as_the_base_and_trains_lengths_and_directions(pretrained: Path) -> None:
    """Before a step the scores are the base's; after two, lengths and both matrices have moved."""
    recipe = _recipe(pretrained, finetuning="lora", lora_rank=4, use_dora=True)
    model, base = _build(recipe), _build(_recipe(pretrained))
    documents = [np.arange(1, 20), np.arange(1, 6)]
    cpu = torch.device("cpu")
    scores = [x.eval().score(documents, cpu) for x in (model, base)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-4)
    before = {name: tensor.clone() for name, tensor in model.trainable_state().items()}
    kinds = {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert {kind for kind in kinds for name in before if kind in name} == kinds
    optimizer = build_optimizer(model.train(), recipe)
    for _ in range(2):
        model(*(torch.from_numpy(x) for x in _batch())).backward()
        optimizer.step()
    after = model.trainable_state()
    assert not any(torch.equal(after[name], before[name]) for name in before)


def _batch() -> tuple[Any, ...]:
    """A batch as a language model takes it."""
    batch = collate([np.arange(1, 20), np.arange(1, 6)])
    return arrays(batch)


def test_dropout_of_the_recipe_reaches_the_model(pretrained: Path) -> None:
    """Two training passes differ with dropout and are equal without."""
    batch = collate([np.arange(1, 20)])
    tensors = [torch.from_numpy(x) for x in arrays(batch)]
    for dropout in (0.0, 0.5):
        model = _build(_recipe(pretrained, dropout=dropout)).train()
        losses = {model(*tensors).item() for _ in range(3)}
        assert len(losses) == (1 if dropout == 0 else 3)


def test_scoring_is_without_dropout_and_leaves_the_mode(pretrained: Path) -> None:
    """A model in training scores as it will after it, and trains on."""
    recipe = _recipe(pretrained, dropout=0.5)
    model = _build(recipe).train()
    accelerator = build_accelerator(recipe)
    first, second = (
        score_documents(model, _Documents([20]), micro_batch_tokens=99, accelerator=accelerator)
        for _ in range(2)
    )
    assert first == second
    assert model.training
    assert model.transformers_model.training


def test_fused_gelu_is_the_same_function(tmp_path: Path) -> None:
    """gelu_pytorch_tanh in place of gelu_new moves a score by rounding only."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(_tiny_config("gpt2")).save_pretrained(tmp_path / "m")
    documents = _Documents([30, 12])
    scores = []
    for fused in (True, False):
        recipe = _recipe(tmp_path / "m", fused_gelu=fused)
        model = _build(recipe)
        expected = "gelu_pytorch_tanh" if fused else "gelu_new"
        assert model.transformers_model.config.activation_function == expected
        accelerator = build_accelerator(recipe)
        scores.append(
            score_documents(model, documents, micro_batch_tokens=99, accelerator=accelerator)
        )
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)


def test_a_model_that_caps_its_logits_is_refused(tmp_path: Path) -> None:
    """Gemma 2 squashes its logits; scoring it with a plain head would be silently wrong."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        hidden_size=32,
        intermediate_size=64,
        vocab_size=VOCAB_SIZE,
        final_logit_softcapping=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    with pytest.raises(UserError, match="changes its logits after the output head"):
        _build(_recipe(tmp_path / "gemma"))


def test_tokenizer_larger_than_the_embedding_is_refused(pretrained: Path) -> None:
    """A tokenizer of another model would index past the embedding."""
    with pytest.raises(UserError, match="do not belong together"):
        build_model(_recipe(pretrained), vocab_size=VOCAB_SIZE + 1, eos_token_id=0)


def test_more_tokens_than_positions_is_refused(pretrained: Path) -> None:
    """Documents longer than the model's positions are refused with the number that works."""
    with pytest.raises(UsageError, match="64 positions"):
        _build(_recipe(pretrained, max_length=200))


def test_scratch_starts_every_class_from_the_same_weights() -> None:
    """What differs between classes after training is what their text taught."""
    recipe = TrainRecipe(model="gpt2-tiny", init="scratch", tokenizer="train", max_length=64)
    first = build_model(recipe, vocab_size=300, eos_token_id=0).trainable_state()
    second = build_model(recipe, vocab_size=300, eos_token_id=0).trainable_state()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_models_folder_is_looked_in_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ACCEL_GPT2_MODELS/gpt2 stands for the hub's gpt2."""
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    assert weights_location("gpt2") == "openai-community/gpt2"
    monkeypatch.setenv("ACCEL_GPT2_MODELS", str(tmp_path))
    assert weights_location("gpt2") == str(tmp_path / "gpt2")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_optimizers_lower_the_loss(optimizer: Any) -> None:
    """Each optimizer of the catalog really trains a model of ours."""
    recipe = TrainRecipe(
        model="gpt2-tiny",
        init="scratch",
        tokenizer="train",
        max_length=64,
        optimizer=optimizer,
        learning_rate=1e-2 if optimizer == "adafactor" else 1e-3,
        dropout=0.0,
    )
    model = build_model(recipe, vocab_size=300, eos_token_id=0).train()
    built = build_optimizer(model, recipe)
    batch = collate([np.arange(1, 20), np.arange(5, 60)])
    tensors = [torch.from_numpy(x) for x in arrays(batch)]
    losses = []
    for _ in range(8):
        loss = model(*tensors) / batch.num_tokens
        losses.append(loss.item())
        loss.backward()
        built.step()
        built.zero_grad()
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_warms_up_and_ends_at_the_floor(schedule: Any) -> None:
    """Warm-up rises to the recipe's rate; the schedule falls to its floor and never below."""
    recipe = TrainRecipe(learning_rate=2.0, warmup_fraction=0.2, lr_schedule=schedule)
    rates = [learning_rate_at(step, 50, recipe) for step in range(50)]
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == pytest.approx(2.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2, rel=0.3)
    assert min(rates[10:]) >= 0.2


@pytest.mark.parametrize(
    ("init", "what"), [("pretrained", "weights"), ("scratch", "configuration")]
)
def test_a_model_that_cannot_be_read_is_one_sentence(tmp_path: Path, init: Any, what: str) -> None:
    """transformers' own error is the reason, for weights and for a configuration alone."""
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    with pytest.raises(UserError, match=f"The {what} of .* cannot be loaded \\(.*recognize"):
        _build(_recipe(tmp_path, init=init))
