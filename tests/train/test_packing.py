"""Packed rows against each document alone: the same losses, gradients and trained weights."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accel_gpt2.data.batching import collate, pack, split_micro_batches
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train import packing
from accel_gpt2.train.causal import LanguageModel, arrays, packed_arrays
from accel_gpt2.train.compiling import compile_blocks
from accel_gpt2.train.packing import ATTENTION, PACKED_FAMILIES, rows_are_packed

VOCAB_SIZE = 101
CPU = torch.device("cpu")
LENGTHS = (5, 17, 2, 9, 9)


def _transformers_model(family: str, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    if family == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    if family == "llama":
        shape["num_key_value_heads"] = 2
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(family, vocab_size=VOCAB_SIZE, **tokens, **shape, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    # As trained ones do: random weights hardly look anywhere.
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _language_model(family: str = "gpt2", **options: Any) -> LanguageModel:
    model = LanguageModel(_transformers_model(family, **options), loss_chunk_tokens=7)
    model.pack_rows(TrainRecipe(packing="on"), CPU)
    return model


def _documents(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(1)
    return [random.integers(1, VOCAB_SIZE, size=length) for length in lengths]


def _tensors(batch: tuple[np.ndarray[Any, Any], ...]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in batch]


def _gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    found = {n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_a_packed_row_is_its_documents_alone(family: str) -> None:
    """Each document's loss by transformers itself, and the gradients, to 1e-5."""
    model = _language_model(family).eval()
    plain = _transformers_model(family).eval()
    documents = _documents()
    tensors = _tensors(packed_arrays(pack(documents)))
    assert tensors[0].shape == (1, sum(LENGTHS) - len(LENGTHS))
    per_token = model.token_log_likelihoods(*tensors)
    loss = model(*tensors)
    loss.backward()
    pieces = torch.split(per_token, [length - 1 for length in LENGTHS])
    for piece, document in zip(pieces, documents, strict=True):
        ids = torch.from_numpy(document)[None]
        summed = plain(input_ids=ids, labels=ids).loss * (len(document) - 1)
        summed.backward()
        assert -piece.sum().item() == pytest.approx(summed.item(), rel=1e-5)
    expected = {f"model.{n}": x.grad for n, x in plain.named_parameters() if x.grad is not None}
    found = _gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_padded_batches_are_scored_as_by_transformers(family: str) -> None:
    """Bit for bit what its own attention gives, which makes a mask where it has to."""
    batch = _tensors(arrays(collate(_documents())))
    stock = LanguageModel(_transformers_model(family), loss_chunk_tokens=7).eval()
    stock.transformers_model.set_attn_implementation("sdpa")
    torch.testing.assert_close(
        _language_model(family).eval().document_log_likelihoods(*batch),
        stock.document_log_likelihoods(*batch),
        rtol=0,
        atol=0,
    )


class _Reads(TorchDispatchMode):
    """Notes the operations whose result the host has to wait for on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.nonzero,
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_a_pass_reads_nothing_from_the_device(family: str, packed: bool) -> None:
    """Forward, backward and scores; transformers' own attention asks for packed rows each time."""
    model = _language_model(family).train()
    documents = _documents()
    padded = _tensors(arrays(collate(documents)))
    tensors = _tensors(packed_arrays(pack(documents))) if packed else padded
    with _Reads() as ours:
        model(*tensors).backward()
        model.token_log_likelihoods(*tensors)
    assert ours.found == []
    model.transformers_model.set_attn_implementation("sdpa")
    with _Reads() as theirs:
        model(*padded)
    assert theirs.found


def test_checkpointed_blocks_know_the_documents() -> None:
    """Recomputed in the backward pass, with dropout, a row gives the same gradients."""
    model = _language_model(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).train()
    tensors = _tensors(packed_arrays(pack(_documents())))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        torch.manual_seed(3)
        model(*tensors).backward()
        found.append(_gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_blocks_know_the_documents() -> None:
    """Traced for any length, a row gives the same gradients, and so does one of other lengths."""
    model = _language_model().eval()
    rows = [_tensors(packed_arrays(pack(_documents(x)))) for x in (LENGTHS, (7, 3, 30))]
    expected = []
    for tensors in rows:
        model(*tensors).backward()
        expected.append(_gradients(model))
    assert compile_blocks(model, backend="aot_eager") == 2
    for tensors, gradients in zip(rows, expected, strict=True):
        model(*tensors).backward()
        for name, gradient in _gradients(model).items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-5)


def test_a_rank_without_documents_has_a_row() -> None:
    """No document at all gives a loss of zero with gradients of zero, for the collectives."""
    model = _language_model()
    loss = model(*_tensors(packed_arrays(pack([]))))
    loss.backward()
    assert loss.item() == 0
    assert all(bool((x == 0).all()) for x in _gradients(model).values())


def test_micro_batches_of_packed_rows_are_full() -> None:
    """Documents are cut by their tokens alone, each exactly once and whole."""
    lengths = np.random.default_rng(0).integers(3, 200, size=300)
    everything = np.arange(300)
    cut = split_micro_batches(
        lengths, everything, world_size=2, micro_batch_tokens=1000, packed=True
    )
    pieces = [piece for step in cut for piece in step]
    assert sorted(np.concatenate(pieces)) == list(range(300))
    tokens = [int((lengths[piece] - 1).sum()) for piece in pieces]
    assert max(tokens) <= 1000
    assert np.mean(tokens) > 900


def test_who_packs() -> None:
    """Language models whose family was checked; what is asked for and cannot be had is refused."""
    recipe = TrainRecipe(packing="auto")
    gpt2, opt = _transformers_model("gpt2"), _transformers_model("opt", ffn_dim=64)
    assert rows_are_packed(recipe, gpt2)
    assert not rows_are_packed(recipe, opt)
    assert not rows_are_packed(dataclasses.replace(recipe, packing="off"), gpt2)
    asked = dataclasses.replace(recipe, packing="on")
    with pytest.raises(UserError, match=r"OPTForCausalLM is not of a family .*packing=off"):
        rows_are_packed(asked, opt)


def test_a_kernel_is_believed_when_it_gives_what_groups_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that fails or lets documents see each other is not taken, and the reason is said."""
    shape = (4, 2, 8, torch.float32, CPU)  # heads, those of keys, width
    check = packing._flash_problem.__wrapped__
    monkeypatch.setattr(packing, "_HALF", (torch.float32,))
    said = check(*shape)  # torch's own has no code for a CPU
    assert said is not None
    assert said.startswith("fails (")

    def all_as_one(query: Any, key: Any, value: Any, documents: Any, scaling: Any) -> Any:
        repeated = [x.repeat_interleave(2, dim=1) for x in (key, value)]
        found = torch.nn.functional.scaled_dot_product_attention(query, *repeated, is_causal=True)
        return found.transpose(1, 2)

    monkeypatch.setattr(packing, "_flash_attention", all_as_one)
    assert check(*shape) == "gives other values"

    def each_alone(query: Any, key: Any, value: Any, documents: Any, scaling: Any) -> Any:
        ends = documents.starts.tolist()
        parts = [
            all_as_one(*(x[:, :, start:end] for x in (query, key, value)), None, None)
            for start, end in itertools.pairwise(ends)
        ]
        return torch.cat(parts, dim=1)

    monkeypatch.setattr(packing, "_flash_attention", each_alone)
    assert check(*shape) is None


def test_an_exported_model_is_transformers_own(tmp_path: Any) -> None:
    """What is saved does not ask for our attention function."""
    _language_model().save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text(encoding="utf-8")
