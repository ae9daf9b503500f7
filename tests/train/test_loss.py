"""The chunked cross-entropy against torch's and transformers' own."""

import pytest
import torch
import torch.nn.functional as F

from accel_gpt2.data.batching import collate
from accel_gpt2.train import loss as loss_module
from accel_gpt2.train.causal import LanguageModel, arrays
from accel_gpt2.train.loss import chunked_cross_entropy, chunked_log_likelihoods


def _problem(num_tokens: int, n_embd: int, vocab_size: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, n_embd, generator=generator)
    weight = torch.randn(vocab_size, n_embd, generator=generator)
    bias = torch.randn(vocab_size, generator=generator)
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    return hidden, weight, bias, targets


@pytest.mark.parametrize("chunk_tokens", [1, 7, 50, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_loss_and_gradients_equal_torchs(chunk_tokens: int, with_bias: bool) -> None:
    """Value and gradients are those of F.cross_entropy, whatever the chunk."""
    hidden, weight, bias, targets = _problem(50, 16, 97)
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    loss = chunked_cross_entropy(
        ours[0], ours[1], ours[2] if with_bias else None, targets, chunk_tokens
    )
    (loss * 0.25).backward()
    logits = F.linear(theirs[0], theirs[1], theirs[2] if with_bias else None)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    (expected * 0.25).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-4, atol=1e-5)


def test_frozen_head_gets_no_gradient() -> None:
    """With LoRA the head is frozen; only the hidden states get a gradient."""
    hidden, weight, _, targets = _problem(10, 4, 11)
    hidden.requires_grad_()
    chunked_cross_entropy(hidden, weight, None, targets, 4).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_second_backward_fails() -> None:
    """Gradients are scaled in place, so a second backward pass must not pass silently."""
    hidden, weight, _, targets = _problem(10, 4, 11)
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, None, targets, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError, match="NoneType"):
        loss.backward()


def test_bf16_logits_lose_nothing_more() -> None:
    """Under autocast the products are bf16; what follows is fp32, however unlikely a target is."""
    hidden, weight, bias, targets = _problem(50, 16, 97)
    hidden[0] = 40 * weight[0] / weight[0].norm()  # its target is a hundred nats away
    targets[0] = int((weight @ weight[0]).argmin())
    ours = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    theirs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(*ours, targets, 7)
        logits = F.linear(*theirs).float()
    expected = F.cross_entropy(logits, targets, reduction="sum")
    assert expected - F.cross_entropy(logits[1:], targets[1:], reduction="sum") > 100
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, reference.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 10_000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_log_likelihoods_from_parts_of_the_vocabulary(with_bias: bool, chunk_tokens: int) -> None:
    """Whatever the parts, and where the largest logits of a row lie, they are torch's own."""
    hidden, weight, bias, targets = _problem(50, 16, 2500)
    hidden *= torch.logspace(-2, 1.5, 50)[:, None]
    bias = bias if with_bias else None
    found = chunked_log_likelihoods(hidden, weight, bias, targets, chunk_tokens)
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert expected.min() < -200
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_log_likelihoods_are_fp32_under_autocast() -> None:
    """Scores never go through bf16 logits: autocast changes nothing in the head."""
    hidden, weight, bias, targets = _problem(20, 8, 30)
    plain = chunked_log_likelihoods(hidden, weight, bias, targets, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = chunked_log_likelihoods(hidden, weight, bias, targets, 6)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)
    expected = F.linear(hidden, weight, bias).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [True, False])
def test_products_of_halves_are_as_good_as_fp32(
    monkeypatch: pytest.MonkeyPatch, with_bias: bool
) -> None:
    """As an A100 multiplies, and in parts of the vocabulary: logits near -100 are as near the exact
    ones as in fp32, and a hundred times as near as by one product of fp16 numbers."""
    hidden, weight, bias, targets = _problem(50, 64, 2500)
    hidden[:, 0], weight[:, 0] = -100.3, 1.01
    given = bias if with_bias else None
    exact = F.linear(hidden.double(), weight.double(), None if given is None else given.double())
    expected = exact.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    in_fp32 = chunked_log_likelihoods(hidden, weight, given, targets, 4)
    monkeypatch.setattr(loss_module, "_multiplies_by_halves", lambda device: True)
    found = chunked_log_likelihoods(hidden, weight, given, targets, 4)
    assert not torch.equal(found, in_fp32)
    off = (found - expected).abs().max()
    assert off < 5 * (in_fp32 - expected).abs().max()
    rounded = [x.half().double() for x in (hidden, weight)]
    plain = F.linear(*rounded, None if given is None else given.double()).logsumexp(-1)
    assert (plain - exact.logsumexp(-1)).abs().max() > 100 * off


def test_a_device_whose_products_of_halves_are_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check that a GPU has to pass first: a product that leaves something out, or fails."""
    cpu = torch.device("cpu")
    assert loss_module.halves_problem(cpu) is None
    right = loss_module._multiply_halves

    def without_the_rest(left: torch.Tensor, halves: torch.Tensor, product: torch.Tensor) -> None:
        third = left.shape[1] // 3
        right(left[:, :third], halves[:, :third], product)

    monkeypatch.setattr(loss_module, "_multiply_halves", without_the_rest)
    assert loss_module.halves_problem(cpu) == "gives other values"

    def fails(*_: torch.Tensor) -> None:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(loss_module, "_multiply_halves", fails)
    assert loss_module.halves_problem(cpu) == "fails (no such kernel)"


def test_model_loss_equals_transformers_loss() -> None:
    """Our loss over padded documents is transformers' own over each document alone, to 1e-5."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=101)).eval()
    generator = torch.Generator().manual_seed(1)
    documents = [
        torch.randint(101, (length,), generator=generator).numpy() for length in (5, 17, 9)
    ]
    batch = collate(documents)
    ours = LanguageModel(model, loss_chunk_tokens=4)(*(torch.from_numpy(x) for x in arrays(batch)))
    theirs = 0.0
    for document in documents:
        ids = torch.from_numpy(document)[None]
        theirs += model(input_ids=ids, labels=ids).loss.item() * (len(document) - 1)
    assert ours.item() == pytest.approx(theirs, rel=1e-5)
