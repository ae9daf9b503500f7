"""Nothing that anybody may have put there is unpickled, and no code of a model is run.

A planted payload writes a file named `planted` when it is unpickled or imported; none ever does.
"""

import ast
import hashlib
import json
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import accel_gpt2
import accel_gpt2.train.model
from tests.fuzz.harness import (
    SHAPE,
    Case,
    check_refusal,
    check_untouched,
    make_workshop,
    run_command,
    train_argv,
    tree_digest,
)

CODE = "open('planted', 'w').close()\n"


class Payload:
    """Unpickling it writes a file into the working directory."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return exec, (CODE,)


PICKLE = pickle.dumps({"payload": Payload()})


def torch_pickle(path: Path) -> None:
    """A file of `torch.save` that holds the payload."""
    torch.save({"payload": Payload()}, path)


def test_the_payload_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpickled, it does write its file: the tests below do not pass for want of a payload."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(PICKLE)
    assert (tmp_path / "planted").exists()
    (tmp_path / "planted").unlink()
    torch_pickle(tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "planted").exists()


def with_tokenizer(*more: str) -> tuple[str, ...]:
    """A training that starts from pretrained weights in `model/`."""
    words = [word for word in train_argv("good") if not word.startswith("--set=tokenizer")]
    words = ["--init=pretrained" if word == "--init=scratch" else word for word in words]
    words = ["--model=model" if word == "--model=shape" else word for word in words]
    return (*words, "--set=tokenizer=run/tokenizer", *more)


CONFIG = json.dumps(SHAPE)
CUSTOM = json.dumps(
    {
        **SHAPE,
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
    }
)
SCRATCH = tuple("--model=model" if word == "--model=shape" else word for word in train_argv("good"))

PLANTED: list[Case] = [
    *(
        Case(
            id=f"weights-{name}",
            argv=with_tokenizer(),
            files={"model/config.json": CONFIG, f"model/{name}": content},
            run=True,
            said=r"holds no \*\.safetensors",
        )
        for name, content in {
            "pytorch_model.bin": PICKLE,
            "model.pt": PICKLE,
            "pytorch_model-torch.bin": torch_pickle,
            "weights.npy": PICKLE,
            "consolidated.00.pth": torch_pickle,
        }.items()
    ),
    Case(
        id="weights-safetensors-in-name-only",
        argv=with_tokenizer(),
        files={"model/config.json": CONFIG, "model/model.safetensors": torch_pickle},
        run=True,
        said=r"cannot be loaded",
    ),
    Case(
        id="weights-index-that-names-a-pickle",
        argv=with_tokenizer(),
        files={
            "model/config.json": CONFIG,
            "model/x.safetensors": b"",
            "model/pytorch_model.bin": torch_pickle,
            "model/model.safetensors.index.json": json.dumps(
                {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
            ),
        },
        run=True,
        said=r"cannot be loaded",
    ),
    *(
        Case(
            id=f"code-{init}",
            argv=argv,
            files={
                "model/config.json": CUSTOM,
                "model/mine.py": f"{CODE}# {init}: transformers runs each content once a process\n",
                "model/model.safetensors": b"",
            },
            run=True,
            said=r"cannot be loaded",
        )
        for init, argv in {"scratch": SCRATCH, "pretrained": with_tokenizer()}.items()
    ),
    Case(
        id="code-of-a-tokenizer",
        argv=tuple(
            "--set=tokenizer=tok" if word == "--set=tokenizer=train" else word
            for word in train_argv("good")
        ),
        files={
            "tok/tokenizer.json": "{}",
            "tok/mine.py": CODE,
            "tok/tokenizer_config.json": json.dumps(
                {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["mine.T", "mine.T"]}}
            ),
        },
        said=r"cannot be loaded",
    ),
    *(
        Case(id=f"data-{id}", argv=train_argv(name), files=files, said=said)
        for id, name, files, said in (
            ("pickle", "x.pkl", {"x.pkl": PICKLE}, r"x\.pkl"),
            ("pickles", "data", {"data/train.pkl": PICKLE}, r"no labelled documents"),
            ("script", "data", {"data/data.py": CODE, "data/x": ""}, r"no labelled documents"),
            ("script-itself", "data.py", {"data.py": CODE}, r"data\.py"),
            ("as-csv", "x.csv", {"x.csv": PICKLE}, r"UTF-8|columns|line 1"),
            ("as-parquet", "x.parquet", {"x.parquet": PICKLE}, r"not a Parquet"),
            ("as-jsonl", "x.jsonl", {"x.jsonl": PICKLE}, r"UTF-8|JSON"),
            ("npy", "x.npy", {"x.npy": PICKLE}, r"x\.npy"),
        )
    ),
]


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: case.id)
def test_planted_code_is_refused_and_does_not_run(
    case: Case, tmp_path: Path, run_template: Path
) -> None:
    """Pickled weights, model and tokenizer code, data scripts: one sentence, and no effect."""
    make_workshop(tmp_path, case, run_template if case.run else None)
    before = tree_digest(tmp_path)
    ended = run_command(case.argv, cwd=tmp_path)
    check_refusal(ended, said=case.said)
    assert not list(tmp_path.rglob("planted"))
    check_untouched(before, tree_digest(tmp_path))


def forge(directory: Path, name: str, write: Callable[[Path], None]) -> None:
    """Put a file into a directory with a manifest, and make the manifest say that it belongs."""
    write(directory / name)
    data = (directory / name).read_bytes()
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))


def half_run(folder: Path, run_template: Path) -> Path:
    """A run whose first class has a checkpoint and no final model yet."""
    make_workshop(folder, Case(id="", argv=(), said=""), run_template)
    shutil.rmtree(folder / "run" / "class-0-fruit" / "final")
    (folder / "run" / "calibration.json").unlink()
    return folder / "run"


GO_ON = train_argv("good", "--set=keep_checkpoints=1", output_dir="run")


def test_a_forged_optimizer_state_is_refused(tmp_path: Path, run_template: Path) -> None:
    """A pickled payload as optimizer.pt, with a manifest that vouches for it, does not run."""
    run = half_run(tmp_path, run_template)
    forge(run / "class-0-fruit" / "checkpoint-1", "optimizer.pt", torch_pickle)
    ended = run_command(GO_ON, cwd=tmp_path)
    check_refusal(ended, said=r"optimizer\.pt")
    assert not list(tmp_path.rglob("planted"))


@pytest.mark.parametrize("name", ["model.safetensors", "random-0.safetensors", "state.json"])
def test_forged_files_of_a_checkpoint_are_refused(
    name: str, tmp_path: Path, run_template: Path
) -> None:
    """A pickle under the name of another file is not that file."""
    run = half_run(tmp_path, run_template)
    forge(run / "class-0-fruit" / "checkpoint-1", name, torch_pickle)
    ended = run_command(GO_ON, cwd=tmp_path)
    check_refusal(ended, said=re.escape(name))
    assert not list(tmp_path.rglob("planted"))


def test_an_array_of_objects_is_refused(tmp_path: Path, run_template: Path) -> None:
    """Validation scores that hold pickled objects are no scores."""
    run = half_run(tmp_path, run_template)
    path = run / "class-1-tools" / "validation_scores" / "1.npy"
    np.save(path, np.array([Payload(), Payload()], dtype=object), allow_pickle=True)
    ended = run_command(GO_ON, cwd=tmp_path)
    check_refusal(ended, said=r"1\.npy is not the scores of \d+ documents")
    assert not list(tmp_path.rglob("planted"))


def test_an_adapter_is_read_from_safetensors_only(tmp_path: Path, run_template: Path) -> None:
    """peft would take a pickled adapter where there is no other; a run's final model has none."""
    make_workshop(tmp_path, Case(id="", argv=(), said=""), run_template)
    final = tmp_path / "run" / "class-0-fruit" / "final"
    base = tmp_path / "run" / "class-1-tools" / "final"
    recipe = tmp_path / "run" / "recipe.yaml"
    record = final / "training.json"
    for path in (recipe, record):  # the recipe of an adapter, and a base that can be loaded
        text = path.read_text().replace("shape", str(base))
        path.write_text(text)
    other = tmp_path / "run" / "class-1-tools" / "final" / "training.json"
    other.write_text(other.read_text().replace('"model": "shape"', f'"model": "{base}"'))
    forge(final, "training.json", lambda _: None)
    forge(base, "training.json", lambda _: None)
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "target_modules": ["c_attn"]}
    forge(final, "adapter_config.json", lambda path: path.write_text(json.dumps(adapter)))
    forge(final, "adapter_model.bin", torch_pickle)
    ended = run_command(("accel-gpt2", "predict", "run", "a pear"), cwd=tmp_path)
    check_refusal(ended, said=r"holds no adapter_model\.safetensors")
    assert not list(tmp_path.rglob("planted"))


def test_a_pickle_in_the_cache_is_not_read_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of the cache replaced by a payload, under names that fit: nothing runs."""
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(tmp_path / "cache"))
    make_workshop(tmp_path, Case(id="", argv=(), said=""), None)
    assert run_command(train_argv("good"), cwd=tmp_path).exit_code == 0
    cached = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(cached) >= 4
    digest = hashlib.sha256(PICKLE).hexdigest()[:32]
    for path in cached:
        path.unlink()
        key, _, suffix = path.name.split(".")
        (path.parent / f"{key}.{digest}.{suffix}").write_bytes(PICKLE)
    ended = run_command(train_argv("good", output_dir="again"), cwd=tmp_path)
    assert ended.exit_code in (0, 1)
    assert not list(tmp_path.rglob("planted"))


SOURCES = sorted(Path(accel_gpt2.__file__).parent.rglob("*.py"))

# What must be said at a call of this name: keyword -> value.
TOLD: dict[str, tuple[str, bool]] = {
    "torch.load": ("weights_only", True),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
    "AutoConfig.from_pretrained": ("trust_remote_code", False),
    "auto_class.from_pretrained": ("trust_remote_code", False),
    "auto_class.from_config": ("trust_remote_code", False),
    "np.load": ("allow_pickle", False),
}


def test_every_reader_is_told_what_not_to_do() -> None:
    """No module imports an unpickler, and no call that can unpickle or fetch code is left to its
    default."""
    seen: Counter[str] = Counter()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                unpicklers = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
                assert not unpicklers & set(names), path
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in TOLD:
                continue
            name = ast.unparse(node.func)
            keyword, value = TOLD[name]
            told = {word.arg: ast.unparse(word.value) for word in node.keywords}
            loading = dict(accel_gpt2.train.model._LOADING) if told.get(None) == "_LOADING" else {}
            assert loading.get(keyword, told.get(keyword)) in (value, str(value)), (path, name)
            seen[name] += 1
    assert len(SOURCES) >= 60
    assert set(seen) == set(TOLD)
    assert seen["auto_class.from_pretrained"] == 2
