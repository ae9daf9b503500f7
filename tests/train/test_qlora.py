"""QLoRA: adapters on a base in 4 or 8 bits are what they would be on the same base dequantised."""

import copy
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel_gpt2.data.tokenizer import load_gpt2_tokenizer
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.manifest import publish_directory
from accel_gpt2.train.model import build_model, load_final
from accel_gpt2.train.optim import build_optimizer
from accel_gpt2.train.preflight import check_available
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.quantized import num_weights

bitsandbytes = pytest.importorskip("bitsandbytes")

VOCAB_SIZE = 97
PAD, MASK = 1, 2
DOCUMENTS = [np.arange(1, 40), np.arange(50, 60), np.arange(3, 30, 2)]


def _save(config: Any, auto_class: str, directory: Path) -> Path:
    """A small model with weights that matter: the usual ones of 0.02 hardly react to anything."""
    import transformers

    config.vocab_size = VOCAB_SIZE
    config.bos_token_id = config.eos_token_id = 0
    config.pad_token_id = PAD
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(config)
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.1)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of 64."""
    from transformers import GPT2Config

    config = GPT2Config(n_layer=2, n_head=2, n_embd=64, n_positions=64)
    return _save(config, "AutoModelForCausalLM", tmp_path_factory.mktemp("base") / "gpt2")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of 64."""
    from transformers import RobertaConfig

    config = RobertaConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_size=64,
        intermediate_size=128,
        max_position_embeddings=66,
        type_vocab_size=1,
    )
    return _save(config, "AutoModelForMaskedLM", tmp_path_factory.mktemp("base") / "roberta")


def _recipe(base: Path, **changes: Any) -> TrainRecipe:
    values: dict[str, Any] = {
        "model": str(base),
        "finetuning": "qlora",
        "dropout": 0.0,
        "max_length": 64,
        "lora_rank": 4,
        "learning_rate": 1e-2,
        **changes,
    }
    return TrainRecipe(**values)


def _build(recipe: TrainRecipe) -> Any:
    return build_model(
        recipe,
        vocab_size=VOCAB_SIZE,
        eos_token_id=0,
        mask_token_id=MASK,
        pad_token_id=PAD,
        class_names=("a", "b"),
    )


def _loss(model: Any) -> torch.Tensor:
    """Per target, of the documents above."""
    labels = np.array([0, 1, 0])
    device = next(model.parameters()).device
    arrays = model.collate(DOCUMENTS, labels, epoch=0)
    loss = model(*(torch.from_numpy(array).to(device) for array in arrays))
    targets = model.num_targets(np.array([len(document) for document in DOCUMENTS])).sum()
    return loss / int(targets)  # type: ignore[no-any-return]


def _train(model: Any, recipe: TrainRecipe, steps: int = 6) -> list[float]:
    """The losses of `steps` optimizer steps on one batch."""
    optimizer = build_optimizer(model.train(), recipe)
    losses = []
    for _ in range(steps):
        loss = _loss(model)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _packed(model: Any) -> dict[str, Any]:
    """The quantised weights by the name that they have in the base."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in model.model.named_parameters()
        if isinstance(parameter, bitsandbytes.nn.Params4bit | bitsandbytes.nn.Int8Params)
    }


def _dequantized_base(model: Any, base: Path, directory: Path) -> Path:
    """A plain copy of the base with every weight as bitsandbytes' own function dequantises it."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base)
    quantized = _packed(model)
    assert len(quantized) == 4 * plain.config.n_layer
    with torch.no_grad():
        for name, packed in quantized.items():
            own = plain.get_parameter(name)
            functional = bitsandbytes.functional
            if isinstance(packed, bitsandbytes.nn.Int8Params):
                weight = functional.int8_vectorwise_dequant(packed.data, packed.SCB)
                least, most = 0.004, 0.01
            else:
                weight = functional.dequantize_4bit(packed.data, packed.quant_state)
                least, most = 0.05, 0.15
            error = (weight.T.cpu() - own).abs().mean() / own.abs().mean()  # Conv1D: [in, out]
            assert least < error < most
            own.copy_(weight.T)
    plain.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_training_is_that_of_lora_on_the_dequantized_base(
    gpt2: Path, tmp_path: Path, quantization: str, checkpointing: bool, use_dora: bool
) -> None:
    """Losses and adapters equal those of LoRA on a plain model with the dequantised weights."""
    # AdamW would turn a rounding difference of a gradient near its default epsilon into a step.
    same: dict[str, Any] = {"use_dora": use_dora, "adam_epsilon": 1e-5}
    recipe = _recipe(gpt2, quantization=quantization, gradient_checkpointing=checkpointing, **same)
    model = _build(recipe)
    base = _dequantized_base(model, gpt2, tmp_path / "plain")
    reference_recipe = _recipe(base, finetuning="lora", **same)
    reference = _build(reference_recipe)
    losses, expected = _train(model, recipe), _train(reference, reference_recipe)
    assert losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    trained, expected_adapter = model.trainable_state(), reference.trainable_state()
    assert trained.keys() == expected_adapter.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, expected_adapter[name], rtol=1e-3, atol=1e-4)


def test_what_is_in_4_bits_and_what_stays(gpt2: Path) -> None:
    """The blocks' matrices take half a byte a weight and their scales; the rest stays fp32."""
    model = _build(_recipe(gpt2))
    base = model.transformers_model
    packed = _packed(model).values()
    assert [num_weights(p) // 64**2 for p in packed] == 2 * [3, 1, 4, 4]
    for parameter in packed:
        weights, state = num_weights(parameter), parameter.quant_state
        assert parameter.nbytes == weights // 2
        assert state.absmax.nbytes == weights // 64  # a scale of 8 bits for each 64
        assert state.state2.absmax.nbytes == 4 * -(-weights // (64 * 256))  # and theirs, fp32
        assert not parameter.requires_grad
    others = [p for p in base.parameters() if not isinstance(p, bitsandbytes.nn.Params4bit)]
    assert {p.dtype for p in others} == {torch.float32}
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(gpt2)
    adapters = sum(tensor.numel() for tensor in model.trainable_state().values())
    assert sum(map(num_weights, model.parameters())) == plain.num_parameters() + adapters


def test_what_is_in_8_bits(gpt2: Path) -> None:
    """The blocks' matrices take a byte a weight and 4 for each output; the rest stays fp32."""
    model = _build(_recipe(gpt2, quantization="int8"))
    packed = _packed(model)
    assert [p.numel() // 64**2 for p in packed.values()] == 2 * [3, 1, 4, 4]
    assert all(p.dtype == torch.int8 and not p.requires_grad for p in packed.values())
    scales = {n: b for n, b in model.named_buffers() if n.endswith(".scale")}
    assert sum(b.nbytes for b in scales.values()) == 2 * 4 * (3 + 1 + 4 + 1) * 64
    others = [p for p in model.transformers_model.parameters() if p.dtype != torch.int8]
    assert {p.dtype for p in others} == {torch.float32}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_checkpointing_frees_what_quantised_layers_take(gpt2: Path, quantization: str) -> None:
    """After the forward pass none of their inputs is alive; bitsandbytes' own 8-bit product would
    keep them all."""
    recipe = _recipe(gpt2, quantization=quantization, gradient_checkpointing=True)
    model = _build(recipe).train()
    seen: list[weakref.ref[torch.Tensor]] = []
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
            module.register_forward_hook(lambda _, inputs, __: seen.append(weakref.ref(inputs[0])))
    loss = _loss(model)
    assert len(seen) == 8
    assert [reference() for reference in seen] == [None] * 8
    loss.backward()


def test_adapters_are_those_of_lora(gpt2: Path) -> None:
    """Same names, shapes and first values as on the base in fp32: either loads the other's."""
    quantized, plain = (
        _build(_recipe(gpt2, finetuning=kind)).trainable_state() for kind in ("qlora", "lora")
    )
    assert len(quantized) == 2 * 4 * 2
    assert quantized.keys() == plain.keys()
    assert all(torch.equal(quantized[name].cpu(), plain[name]) for name in plain)


def test_only_adapters_move_and_scoring_in_between_leaves_training_alone(
    gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score between two steps changes neither weights nor losses, whatever the CPU can do."""
    recipe = _recipe(gpt2)
    expected = _train(_build(recipe), recipe)
    # On a CPU with AVX512-BF16 bitsandbytes repacks the weights at the first scoring.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model = _build(recipe)
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    device = next(model.parameters()).device
    model.eval().score(DOCUMENTS, device)
    assert _train(model, recipe) == expected
    trained = model.trainable_state()
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "pure_bf16"])
def test_a_final_scores_as_the_model_in_training_did(
    gpt2: Path, tmp_path: Path, mixed_precision: Any, quantization: str
) -> None:
    """`final/` is the adapter alone; on the base, quantised anew, it scores bit for bit alike."""
    recipe = _recipe(gpt2, mixed_precision=mixed_precision, quantization=quantization)
    accelerator = build_accelerator(recipe)
    model = _build(recipe).to(accelerator.device)
    _train(model, recipe, steps=2)

    def write(staging: Path) -> None:
        model.eval().save_pretrained(staging)
        load_gpt2_tokenizer().save(staging)

    final = tmp_path / "final"
    publish_directory(final, write)
    assert [path.name for path in final.glob("*.safetensors")] == ["adapter_model.safetensors"]
    adapter_bytes = sum(tensor.nbytes for tensor in model.trainable_state().values())
    assert (final / "adapter_model.safetensors").stat().st_size < adapter_bytes + 4096
    loaded = load_final(final, recipe).to(accelerator.device)
    with accelerator.autocast():
        scores, expected = (m.score(DOCUMENTS, accelerator.device) for m in (loaded, model))
    assert torch.equal(scores, expected)
    assert len(_packed(loaded)) == 8


@pytest.mark.parametrize(
    ("objective", "family"),
    [
        ("unconditional", "gpt2"),
        ("classification", "gpt2"),
        ("masked_lm", "roberta"),
        ("classification", "roberta"),
    ],
)
def test_other_objectives_train_on_a_base_in_4_bits(
    request: pytest.FixtureRequest, objective: Any, family: str
) -> None:
    """Heads are left out of the quantisation: a classification head is trained whole."""
    recipe = _recipe(request.getfixturevalue(family), objective=objective)
    model = _build(recipe)
    per_block = {"gpt2": 4, "roberta": 6}[family]
    assert len(_packed(model)) == 2 * per_block
    assert not any("score" in x or "classifier" in x or "head" in x for x in _packed(model))
    losses = _train(model, recipe)
    assert losses[-1] < losses[0] - 0.1
    if objective == "classification":
        assert any("lora" not in name for name in model.trainable_state())


def _saved_bytes(model: Any) -> int:
    """What autograd keeps of a forward pass under bf16 autocast, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    device = next(model.parameters()).device
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device.type, dtype=torch.bfloat16),
    ):
        _loss(model)
    return sum(storage.nbytes() for storage in kept.values())


def test_under_autocast_it_keeps_what_lora_keeps_less_the_copies_of_weights(gpt2: Path) -> None:
    """Activations are bf16 as over plain layers, and no bf16 copy of a frozen weight lives on."""
    quantized, plain = (
        _saved_bytes(_build(_recipe(gpt2, finetuning=kind, mixed_precision="bf16")).train())
        for kind in ("qlora", "lora")
    )
    # Two blocks of twelve squares, but for the first c_attn: nothing below it wants a gradient.
    assert plain - quantized == 2 * (2 * 12 - 3) * 64**2


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_model_can_be_moved_and_copied(gpt2: Path, quantization: str) -> None:
    """What Accelerate and a scorer do with any model leaves the quantised weights whole."""
    model = _build(_recipe(gpt2, quantization=quantization)).eval()
    device = next(model.parameters()).device
    expected = model.score(DOCUMENTS, device)
    copied = copy.deepcopy(model)
    moved = model.cpu().to(device)
    assert torch.equal(moved.score(DOCUMENTS, device), expected)
    assert torch.equal(copied.score(DOCUMENTS, device), expected)


def test_without_bitsandbytes_it_is_refused_before_anything_is_loaded(
    gpt2: Path, texts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On macOS there is no bitsandbytes: training says so at once, and so does scoring."""
    import importlib.util

    real = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "bitsandbytes" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    recipe = _recipe(gpt2, dataset=str(texts_file))
    for attempt in (check_available, _build):
        with pytest.raises(UserError, match="needs bitsandbytes, which is not installed"):
            attempt(recipe)
