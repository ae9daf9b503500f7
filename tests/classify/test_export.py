"""An exported model is a plain directory of transformers that scores as the run does."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel_gpt2.classify.export import export_run
from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.run import open_run
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.train.manifest import publish_directory, verify
from accel_gpt2.train.model import load_final
from tests.conftest import write_texts

from .conftest import resolve_tiny

DOCUMENTS = [np.array([0, 5, 9, 33, 2, 0]), np.array([0, 7, 7, 250, 0]), np.arange(40) % 256]

_NEEDS_BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def adapter_run(
    request: pytest.FixtureRequest,
    trained_run: Path,
    tmp_path_factory: pytest.TempPathFactory,
    session_cache: Path,
) -> Path:
    """Two classes' adapters of one kind, far from where they start, on a model trained before."""
    folder = tmp_path_factory.mktemp("adapters")
    resolved = resolve_tiny(
        write_texts(folder / "texts.csv", documents_per_class=30, num_classes=2),
        model=str(next(trained_run.glob("class-0-*/final"))),
        init="pretrained",
        tokenizer="auto",
        learning_rate=2e-2,
        epochs=1.0,
        **request.param,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
        fit(resolved, folder / "run", quiet=True)
    return folder / "run"


def _plain_scores(directory: Path) -> list[float]:
    """log p of each document by transformers' own loss, in nats."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    scores = []
    for document in DOCUMENTS:
        ids = torch.from_numpy(document)[None]
        with torch.no_grad():
            scores.append(-model(input_ids=ids, labels=ids).loss.item() * (len(document) - 1))
    return scores


def _run_scores(run_directory: Path) -> list[list[float]]:
    run = open_run(run_directory)
    return [
        load_final(final, run.recipe).score(DOCUMENTS, torch.device("cpu")).tolist()
        for final in run.finals
    ]


@pytest.mark.parametrize(
    "adapter_run",
    [
        pytest.param({"finetuning": "lora"}, id="lora"),
        pytest.param({"finetuning": "lora", "use_dora": True}, id="dora"),
        pytest.param({"finetuning": "qlora"}, id="nf4", marks=_NEEDS_BITSANDBYTES),
        pytest.param(
            {"finetuning": "qlora", "quantization": "int8", "use_dora": True},
            id="int8-dora",
            marks=_NEEDS_BITSANDBYTES,
        ),
    ],
    indirect=True,
)
def test_a_merged_adapter_scores_as_the_adapter_on_its_base(
    adapter_run: Path, tmp_path: Path
) -> None:
    """For each kind of adapter and base, on GPT-2's Conv1D: equal to 1e-5 by transformers alone."""
    from transformers import AutoTokenizer
    from transformers.pytorch_utils import Conv1D

    expected = _run_scores(adapter_run)
    base = _plain_scores(Path(open_run(adapter_run).recipe.model))
    exported = export_run(adapter_run, tmp_path / "out")
    assert [x.kind for x in exported] == ["merged adapter"] * 2
    for model, scores in zip(exported, expected, strict=True):
        np.testing.assert_allclose(_plain_scores(model.directory), scores, rtol=1e-5)
        assert not np.allclose(scores, base, rtol=1e-2)  # or the adapter had nothing to merge
        verify(model.directory)
        assert not list(model.directory.glob("*adapter*"))
        assert AutoTokenizer.from_pretrained(model.directory).vocab_size > 256
        config = json.loads((model.directory / "config.json").read_text())
        assert "quantization_config" not in config
        assert model.bytes >= sum(x.stat().st_size for x in model.directory.glob("*.safetensors"))
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(exported[0].directory)
    assert sum(isinstance(module, Conv1D) for module in loaded.modules()) == 8


@pytest.mark.parametrize("adapter_run", [{"finetuning": "lora"}], indirect=True)
def test_an_adapter_alone_is_what_peft_loads(adapter_run: Path, tmp_path: Path) -> None:
    """With merge=False the files of the adapter and the tokenizer are copied, and nothing else."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (model,) = export_run(adapter_run, tmp_path, class_name="river", merge=False)
    assert model.kind == "adapter"
    assert model.directory.name.startswith("class-1-")
    assert not (model.directory / "training.json").exists()
    base = AutoModelForCausalLM.from_pretrained(open_run(adapter_run).recipe.model)
    plain = PeftModel.from_pretrained(base, model.directory).merge_and_unload()
    plain.save_pretrained(tmp_path / "by-peft")
    expected = _run_scores(adapter_run)[1]
    np.testing.assert_allclose(_plain_scores(tmp_path / "by-peft"), expected, rtol=1e-4)
    with pytest.raises(UsageError, match=r"--no-merge with --dtype bf16: an adapter alone"):
        export_run(adapter_run, tmp_path / "other", merge=False, dtype="bf16")


def test_a_whole_model_is_exported_as_it_was_trained(trained_run: Path, tmp_path: Path) -> None:
    """Three classes, three directories, the same scores; in bf16 half the bytes."""
    exported = export_run(trained_run, tmp_path / "fp32")
    assert [x.class_name for x in exported] == list(open_run(trained_run).class_names)
    for model, scores in zip(exported, _run_scores(trained_run), strict=True):
        assert (model.kind, model.dtype) == ("model", "float32")
        np.testing.assert_allclose(_plain_scores(model.directory), scores, rtol=1e-5)
    halved = export_run(trained_run, tmp_path / "bf16", dtype="bf16")
    size, half = ((x[0].directory / "model.safetensors").stat().st_size for x in (exported, halved))
    assert half == pytest.approx(size / 2, rel=0.02)
    assert halved[0].dtype == "bfloat16"
    with pytest.raises(UsageError, match=r"was trained whole and has no adapter"):
        export_run(trained_run, tmp_path / "other", merge=False)


def test_what_is_there_is_left_alone(trained_run: Path, tmp_path: Path) -> None:
    """A folder with an export's name stops it before anything is written."""
    name = next(trained_run.glob("class-2-*")).name
    publish_directory(tmp_path / name, lambda staging: (staging / "mine").touch())
    with pytest.raises(UserError, match=rf"{name} is there already and is left as it is"):
        export_run(trained_run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "mine").exists()


def test_without_room_nothing_is_left(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is said before the weights are written, and no folder stays."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"takes .*MiB and the disk has 1000 B free; make room"):
        export_run(trained_run, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_class_that_is_not_there_or_not_trained(trained_run: Path, tmp_path: Path) -> None:
    """Both are told apart; another class of an unfinished run can be exported."""
    with pytest.raises(UsageError, match=r"has no model of 'orbi', but of .*mean 'orbit'\?"):
        export_run(trained_run, tmp_path, class_name="orbi")
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    shutil.rmtree(next(run.glob("class-1-*")) / "final")
    with pytest.raises(UserError, match=r"orbit is not trained to the end: .* give --class"):
        export_run(run, tmp_path / "out")
    (model,) = export_run(run, tmp_path / "out", class_name="kitchen")
    verify(model.directory)


def test_a_damaged_model_is_not_exported(trained_run: Path, tmp_path: Path) -> None:
    """A changed byte of the weights is found, and nothing is written."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    weights: Any = next(run.glob("class-0-*/final/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged: the content of model\.safetensors"):
        export_run(run, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
