"""A traced training step is the real one's memory, whatever the recipe and the architecture."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.trace import memory, tracing
from accel_gpt2.trace.memory import TracedMemory, TraceRequest, trace_all, trace_memory
from accel_gpt2.trace.plan import plan_traced
from tests.trace.real_memory import real_peak_bytes

# Real tensors are not rounded on a CPU, and what small tables operations make is not seen.
TOLERANCE = 1e-3

LENGTH = 65
VOCAB_SIZE = 2048

_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "gptj": {"model_type": "gptj", "n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16},
}

PACKED = "packed rows"

REAL: dict[str, dict[str, Any]] = {
    "dropout and accumulation": {"dropout": 0.1, "num_micro_batches": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "stock loss and gelu_new": {"stock_loss": True, "fused_gelu": False, "num_micro_batches": 2},
    "lora": {"finetuning": "lora"},
    "adafactor": {"optimizer": "adafactor"},
    # Enough tokens, because on a CPU bitsandbytes makes fp32 copies that its GPU kernels do not.
    "adamw_8bit": {"optimizer": "adamw_8bit", "micro_batch_tokens": 512},
    "classification": {"objective": "classification"},
    "hybrid": {"objective": "hybrid"},
    "masked_lm": {"objective": "masked_lm", "model": "roberta-tiny"},
    "llama": {"model": "llama", "finetuning": "lora", "gradient_checkpointing": True},
    "gpt_neox": {"model": "gpt_neox"},
    PACKED: {"packing": "on", "dropout": 0.1},
}

# Each once from two shallow models, once whole.
DEEP: dict[str, dict[str, Any]] = {
    "pure bf16 and 8-bit states": {"mixed_precision": "pure_bf16", "optimizer": "adamw_8bit"},
    "lora": {"mixed_precision": "fp16", "finetuning": "lora", "gradient_checkpointing": True},
    "gptj": {"mixed_precision": "bf16", "model": "gptj", "num_micro_batches": 2},
}

PLANNED: dict[str, Any] = {"model": "llama", "mixed_precision": "bf16", "num_micro_batches": 2}


def _request(folder: Path, **values: Any) -> TraceRequest:
    fields = {x.name for x in dataclasses.fields(TraceRequest)} - {"micro_batch_tokens"}
    options = {key: values.pop(key) for key in list(values) if key in fields}
    if values.get("model") in _ARCHITECTURES:
        values["model"] = str(folder / values["model"])
    recipe = TrainRecipe(
        **{
            "model": "gpt2-tiny",
            "init": "scratch",
            "max_length": LENGTH,
            "micro_batch_tokens": 256,
            "loss_chunk_tokens": 128,
            "dropout": 0.0,
            "packing": "off",
            **values,
        }
    )
    return TraceRequest(
        recipe=recipe, **{"longest_tokens": LENGTH, "vocab_size": VOCAB_SIZE, **options}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a directory for each architecture that has no catalog row."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in _ARCHITECTURES.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(
            json.dumps({**config, "max_position_embeddings": 128, "vocab_size": VOCAB_SIZE})
        )
    return folder


@pytest.fixture(scope="module")
def traced(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], TracedMemory]:
    """All traces of this module, from one process."""
    requests = {("real", name): _request(folder, device="cpu", **v) for name, v in REAL.items()}
    requests["planned", ""] = _request(folder, **PLANNED)
    for name, values in DEEP.items():
        deep = _request(folder, n_layer=5, **values)
        requests["shallow", name] = deep
        requests["whole", name] = dataclasses.replace(deep, whole=True)
    with pytest.MonkeyPatch.context() as patch:  # the cache that all tests are given
        patch.setenv("ACCEL_GPT2_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return dict(zip(requests, trace_all(list(requests.values())), strict=True))


@pytest.mark.parametrize("name", REAL)
def test_a_trace_is_what_the_allocator_of_a_cpu_counts(
    traced: dict[tuple[str, str], TracedMemory], folder: Path, name: str
) -> None:
    """Two real steps and an evaluation, by the events of torch's own allocator."""
    request = _request(folder, **REAL[name])
    training, evaluation = real_peak_bytes(request)
    phases = dict(traced["real", name].phases)
    assert phases.pop("evaluation") == pytest.approx(evaluation, rel=2 * TOLERANCE)
    # Copying by index needs 40 bytes a token on a CPU, which no tensor shows.
    tolerance = 4 * TOLERANCE if name == PACKED else TOLERANCE
    assert max(phases.values()) == pytest.approx(training, rel=tolerance)


@pytest.mark.parametrize("name", DEEP)
def test_two_shallow_models_tell_of_a_deep_one(
    traced: dict[tuple[str, str], TracedMemory], name: str
) -> None:
    """To the byte, in every phase."""
    assert traced["shallow", name] == traced["whole", name]


def test_parameters_and_states_are_counted(traced: dict[tuple[str, str], TracedMemory]) -> None:
    """AdamW keeps two numbers for each, bitsandbytes two bytes and their scales."""
    full = traced["real", "dropout and accumulation"]
    num_parameters = dataclasses.replace(MODELS["gpt2-tiny"], vocab_size=VOCAB_SIZE).num_parameters
    assert full.num_parameters == full.num_trained_parameters == num_parameters
    assert full.parameters_bytes == full.gradients_bytes == 4 * num_parameters
    assert full.optimizer_bytes == pytest.approx(8 * num_parameters, rel=1e-3)
    eight_bit = traced["real", "adamw_8bit"]
    assert 2.03 * num_parameters < eight_bit.optimizer_bytes < 2.2 * num_parameters
    lora = traced["real", "lora"]
    assert lora.num_trained_parameters < lora.num_parameters - num_parameters + 1


def test_what_was_traced_once_is_not_traced_again(
    traced: dict[tuple[str, str], TracedMemory], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for another learning rate either; but for another batch it is."""
    request = _request(folder, device="cpu", optimizer="adafactor")
    asked = []

    def ask(requests: Any, timeout_seconds: float) -> list[dict[str, Any]]:
        asked.extend(requests)
        return [dataclasses.asdict(traced["real", "adafactor"]) for _ in requests]

    monkeypatch.setattr(memory, "_ask", ask)
    faster = dataclasses.replace(request.recipe, learning_rate=1.0, dataset="other", seed=3)
    assert trace_memory(request) == traced["real", "adafactor"]
    assert trace_memory(dataclasses.replace(request, recipe=faster)) == traced["real", "adafactor"]
    assert not asked
    larger = dataclasses.replace(request, micro_batch_tokens=1024)
    trace_memory(larger)
    assert [x.recipe.micro_batch_tokens for x in asked] == [1024]


def test_who_asks_loads_no_torch(traced: dict[tuple[str, str], TracedMemory], folder: Path) -> None:
    """A plan of a model without closed form comes from the cache in a process without torch."""
    del traced  # by now it is in the cache
    code = (
        "import sys\n"
        "from accel_gpt2.recipe import TrainRecipe\n"
        "from accel_gpt2.trace.memory import TraceRequest, trace_memory\n"
        "recipe = TrainRecipe(model='gpt2-tiny', micro_batch_tokens=256, loss_chunk_tokens=128,"
        " dropout=0.0, optimizer='adafactor')\n"
        f"request = TraceRequest(recipe=recipe, longest_tokens={LENGTH}, vocab_size={VOCAB_SIZE},"
        " device='cpu')\n"
        "print(trace_memory(request).peak_bytes, *{'torch', 'numpy'} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1


def test_a_step_that_cannot_be_traced_is_explained(tmp_path: Path) -> None:
    """With the reason that the other process gave."""
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    request = _request(tmp_path, model=str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be traced \(ValueError: .*`abacus`"):
        trace_memory(request)
    with pytest.raises(UserError, match=r"base in 4 bits is not traced"):
        tracing.trace(_request(tmp_path, finetuning="qlora"))
    with pytest.raises(UserError, match=r"could not be traced in 0 s"):
        trace_all([request], timeout_seconds=0.01)


def test_a_trace_becomes_a_plan(traced: dict[tuple[str, str], TracedMemory], folder: Path) -> None:
    """With its peak, its states on the disk, and a copy of the gradients under DDP."""
    recipe = dataclasses.replace(_request(folder, **PLANNED).recipe, global_batch_tokens=512)
    found = traced["planned", ""]
    options: dict[str, Any] = {"longest_tokens": LENGTH, "vocab_size": VOCAB_SIZE}
    alone = plan_traced(recipe, PROFILES["rtx4070ti"], STRATEGIES["single"], **options)
    libraries = sum(x.bytes for x in alone.terms if x.name == "cuBLAS workspaces")
    assert alone.source == "trace"
    assert alone.allocated_bytes == found.peak_bytes + libraries
    assert alone.peak.name == found.peak_phase
    assert alone.verdict == "fits"
    pair = plan_traced(recipe, PROFILES["2x-rtx4070ti"], STRATEGIES["ddp"], **options)
    (buckets,) = (term for term in pair.terms if term.name == "DDP buckets")
    assert buckets.bytes == found.gradients_bytes
    with pytest.raises(UsageError, match=r"under fsdp2 is not known.*plan it for one GPU"):
        plan_traced(recipe, PROFILES["2x-rtx4070ti"], STRATEGIES["fsdp2"], **options)
