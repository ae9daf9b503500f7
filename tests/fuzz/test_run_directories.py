"""Run directories, checkpoints and models that are damaged, half there, or something else."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fuzz.harness import (
    SHAPE,
    Case,
    Content,
    check_case,
    train_argv,
)

EVALUATE = ("accel-gpt2", "evaluate", "run", "--quiet")
PREDICT = ("accel-gpt2", "predict", "run", "a ripe apple")
REPORT = ("accel-gpt2", "report", "run")
GO_ON = train_argv("good", "--set=keep_checkpoints=1", output_dir="run")

# Contents that are no JSON object of any kind of file.
NOT_JSON: dict[str, Content] = {
    "empty": b"",
    "binary": bytes(range(256)),
    "text": "hello",
    "cut": '{"class_names": ["fruit", "to',
    "list": "[]",
    "null": "null",
    "number": "3",
    "nested": "[" * 20_000,
    "folder": None,
    "pipe": os.mkfifo,
    "utf-16": '{"a": 1}'.encode("utf-16"),
}


def replace(content: Content) -> Callable[[Path], None]:
    """Put something else in the place of a file."""

    def act(path: Path) -> None:
        path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)
        if content is None:
            path.mkdir()
        elif callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return act


def change(**values: object) -> Callable[[Path], None]:
    """Other values in a JSON object; None takes the key away."""

    def act(path: Path) -> None:
        content = json.loads(path.read_text("utf-8"))
        for key, value in values.items():
            content.pop(key, None)
            if value is not None:
                content[key] = value
        path.write_text(json.dumps(content), encoding="utf-8")

    return act


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    """The second half goes."""
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    """Gone."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def in_file(name: str, act: Callable[[Path], None]) -> Callable[[Path], None]:
    """A case's file entry that damages a file of the copied run in place."""
    return lambda _: act(Path(name))


def damaged(
    id: str, name: str, act: Callable[[Path], None], said: str, *verbs: tuple[str, ...]
) -> list[Case]:
    """A trained run with one file damaged, for each of these commands."""
    return [
        Case(
            id=f"{argv[1] if argv[0] == 'accel-gpt2' else 'train'}-{id}",
            argv=argv,
            said=said,
            run=True,
            files={f"run/{name}": _Act(act)},
        )
        for argv in verbs
    ]


class _Act:
    """Damage to a file that is there; `write_content` calls it with the path."""

    def __init__(self, act: Callable[[Path], None]) -> None:
        self.act = act

    def __call__(self, path: Path) -> None:
        self.act(path)


def npy(array: Any, *, allow_pickle: bool = False) -> Callable[[Path], None]:
    """A `.npy` file."""
    return lambda path: np.save(path, array, allow_pickle=allow_pickle)


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    """A file in the form of safetensors: the header's length, the header, the tensors."""
    return struct.pack("<Q", len(header)) + header + data


def model(
    config: Mapping[str, object] | bytes | None, weights: Content = None, **more: Content
) -> dict[str, Content]:
    """A model folder."""
    files: dict[str, Content] = {}
    if config is not None:
        files["model/config.json"] = config if isinstance(config, bytes) else json.dumps(config)
    if weights is not None:
        files["model/model.safetensors"] = weights
    files.update({f"model/{name.replace('__', '.')}": content for name, content in more.items()})
    return files


def train_model(*more: str, init: str = "scratch") -> tuple[str, ...]:
    """Train from the folder `model/`."""
    words = [f"--init={init}" if word == "--init=scratch" else word for word in train_argv("good")]
    if init == "pretrained":
        words = [w for w in words if not w.startswith("--set=tokenizer")]
    return (*("--model=model" if word == "--model=shape" else word for word in words), *more)


NO_RUNS: list[Case] = [
    Case(
        id=f"{verb}-{id}",
        argv=("accel-gpt2", verb, path, *words),
        files=files,
        said=said,
        exit_codes=(1, 2),
    )
    for verb, words in (("evaluate", ()), ("predict", ("a text",)), ("report", ()))
    for id, path, files, said in (
        ("nowhere", "nothing", {}, r"nothing does not exist"),
        ("empty-name", "", {}, r"is not a run directory"),
        ("a-file", "f", {"f": "x"}, r"f is not a run directory"),
        ("a-pipe", "f", {"f": os.mkfifo}, r"f is not a run directory"),
        ("an-empty-folder", "d", {"d": None}, r"d is not a run directory"),
        ("data", "good", {}, r"good is not a run directory"),
        ("a-device", "/dev/null", {}, r"/dev/null is not a run directory"),
        ("root", "/", {}, r"/ is not a run directory"),
        ("too-long", "r" * 5000, {}, r"r{50}"),
        ("escape", "\x1b[2J", {}, r"\\x1b\[2J does not exist"),
        ("bytes", "\udcff", {}, r"udcff"),
        (
            "link-to-itself",
            "l",
            {"l": lambda path: path.symlink_to("l")},
            r"l (does not exist|is not)",
        ),
        ("recipe-is-a-folder", "d", {"d/recipe.yaml": None}, r"d is not a run directory"),
        ("recipe-is-a-pipe", "d", {"d/recipe.yaml": os.mkfifo}, r"d is not a run directory"),
    )
]

HALF_RUNS: list[Case] = [
    *(
        Case(id=f"{argv[1]}-{id}", argv=argv, files=files, said=said)
        for argv in (EVALUATE, PREDICT)
        for id, files, said in (
            ("only-a-recipe", {"run/recipe.yaml": "{}"}, r"it has no plan\.json"),
            (
                "bad-recipe",
                {"run/recipe.yaml": "{", "run/plan.json": "{}"},
                r"recipe\.yaml is not YAML",
            ),
            (
                "unknown-key",
                {"run/recipe.yaml": "sed: 1", "run/plan.json": "{}"},
                r"Did you mean 'seed'",
            ),
            ("bad-value", {"run/recipe.yaml": "seed: x", "run/plan.json": "{}"}, r"seed = 'x'"),
            ("binary-recipe", {"run/recipe.yaml": b"\xff", "run/plan.json": "{}"}, r"not UTF-8"),
            (
                "empty-plan",
                {"run/recipe.yaml": "{}", "run/plan.json": ""},
                r"plan\.json cannot be read",
            ),
        )
    ),
    *damaged("no-class", "class-1-tools", remove, r"tools is missing", EVALUATE, PREDICT),
    *damaged("no-final", "class-0-fruit/final", remove, r"fruit is missing", EVALUATE, PREDICT),
    *damaged(
        "empty-final", "class-0-fruit/final", replace(None), r"fruit is missing", EVALUATE, PREDICT
    ),
    *damaged(
        "final-is-a-file",
        "class-0-fruit/final",
        replace("x"),
        r"fruit is missing",
        EVALUATE,
        PREDICT,
    ),
    *damaged(
        "final-is-a-pipe", "class-0-fruit/final", replace(os.mkfifo), r"fruit is missing", EVALUATE
    ),
    *damaged(
        "no-calibration",
        "calibration.json",
        remove,
        r"calibration\.json is missing",
        EVALUATE,
        PREDICT,
    ),
    *damaged("no-plan", "plan.json", remove, r"it has no plan\.json", EVALUATE, PREDICT),
    *damaged(
        "no-recipe", "recipe.yaml", remove, r"is not a run directory", EVALUATE, PREDICT, REPORT
    ),
]

DAMAGED: list[Case] = [
    *(
        case
        for id, content in NOT_JSON.items()
        for name in ("plan.json", "calibration.json", "class-0-fruit/final/training.json")
        for case in damaged(
            f"{name.rpartition('/')[2]}-{id}",
            name,
            replace(content),
            r"cannot be read|is missing|is damaged|has no plan|has changed",
            *((EVALUATE, PREDICT) if id in ("cut", "list", "pipe") else (PREDICT,)),
        )
    ),
    *(
        case
        for id, values, said in (
            ("names-missing", {"class_names": None}, r"class_names"),
            ("names-number", {"class_names": 3}, r"class_names"),
            ("names-numbers", {"class_names": [1, 2]}, r"class_names"),
            ("names-string", {"class_names": "fruit"}, r"class_names"),
            ("names-one", {"class_names": ["fruit"]}, r"class_names"),
            ("names-twice", {"class_names": ["fruit", "fruit"]}, r"do not go together"),
            ("names-more", {"class_names": ["fruit", "tools", "more"]}, r"do not go together"),
            ("names-swapped", {"class_names": ["tools", "fruit"]}, r"tools.* missing"),
            ("names-climb", {"class_names": ["../../x", "/etc/passwd"]}, r"are missing"),
            ("names-escape", {"class_names": ["\x1b[31m", "\x07"]}, r"\\x1b\[31m.* missing"),
            ("names-endless", {"class_names": ["n" * 50_000, "m"]}, r"missing"),
            ("counts-missing", {"class_counts": None}, r"class_counts"),
            ("counts-zero", {"class_counts": [0, 3]}, r"class_counts"),
            ("counts-negative", {"class_counts": [-1, 3]}, r"class_counts"),
            ("counts-broken", {"class_counts": [1.5, 3]}, r"class_counts"),
            ("counts-words", {"class_counts": ["a", "b"]}, r"class_counts"),
            ("counts-huge", {"class_counts": [10**30, 3]}, r"class_counts"),
            ("counts-more", {"class_counts": [1, 2, 3]}, r"do not go together"),
            ("counts-nan", {"class_counts": [float("nan"), 3]}, r"class_counts"),
            ("text-missing", {"data_fingerprint": None}, r"data_fingerprint"),
            ("text-number", {"data_fingerprint": 7}, r"data_fingerprint"),
            ("text-other", {"data_fingerprint": "0" * 32}, r"data_fingerprint = .* was changed"),
            ("parameters", {"num_parameters": "many"}, r"num_parameters"),
            ("source", {"data_source": None}, r"data_source"),
        )
        for case in damaged(f"plan-{id}", "plan.json", change(**values), said, EVALUATE, PREDICT)
    ),
    *(
        case
        for id, values in {
            "scale-missing": {"scale": None},
            "scale-word": {"scale": "big"},
            "scale-zero": {"scale": 0.0},
            "scale-negative": {"scale": -1.0},
            "scale-nan": {"scale": float("nan")},
            "scale-infinite": {"scale": float("inf")},
            "bias-short": {"bias": [0.0]},
            "bias-long": {"bias": [0.0] * 50},
            "bias-nan": {"bias": [float("nan"), 0.0]},
            "bias-words": {"bias": ["a", "b"]},
            "bias-number": {"bias": 1.0},
            "slope-missing": {"length_slope": None},
            "slope-nested": {"length_slope": [[0.0], [0.0]]},
        }.items()
        for case in damaged(
            f"calibration-{id}", "calibration.json", change(**values), r"calibration\.json", PREDICT
        )
    ),
    *(
        case
        for name in ("model.safetensors", "config.json", "tokenizer.json", "training.json")
        for id, act in {"flip": flip, "cut": cut, "gone": remove, "empty": replace(b"")}.items()
        for case in damaged(
            f"final-{name}-{id}",
            f"class-0-fruit/final/{name}",
            act,
            r"is damaged|is missing|cannot be read",
            *((EVALUATE, PREDICT) if id == "flip" else (PREDICT,)),
        )
    ),
    *(
        case
        for id, content in {**NOT_JSON, "object": "{}", "files": '{"format_version": 1}'}.items()
        for case in damaged(
            f"manifest-{id}",
            "class-1-tools/final/manifest.json",
            replace(content),
            r"manifest|format|is missing",
            PREDICT,
        )
    ),
    *(
        case
        for id, files in {
            "climbs": {"../../../good/train.csv": {"bytes": 1, "sha256": "0" * 64}},
            "absolute": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}},
            "nul": {"a\0b": {"bytes": 1, "sha256": "0" * 64}},
            "size": {"config.json": {"bytes": -1, "sha256": "0" * 64}},
            "hash": {"config.json": {"bytes": 1, "sha256": "../x"}},
            "names-only": ["config.json"],
            "empty-name": {"": {"bytes": 1, "sha256": "0" * 64}},
        }.items()
        for case in damaged(
            f"manifest-{id}",
            "class-1-tools/final/manifest.json",
            change(files=files),
            r"manifest\.json|is damaged",
            PREDICT,
        )
    ),
    *damaged(
        "changed-recipe",
        "recipe.yaml",
        lambda p: p.write_text(p.read_text().replace("max_length: 16", "max_length: 15")),
        r"max_length = 16 \(now 15\)",
        EVALUATE,
        PREDICT,
    ),
    *damaged(
        "changed-gelu",
        "recipe.yaml",
        lambda p: p.write_text(p.read_text().replace("fused_gelu: true", "fused_gelu: false")),
        r"fused_gelu = True \(now False\)",
        PREDICT,
    ),
    *damaged(
        "changed-data",
        "../good/train.csv",
        lambda p: p.write_text(p.read_text() + "more,fruit\n"),
        r"has changed since",
        EVALUATE,
    ),
    *damaged("gone-data", "../good/train.csv", remove, r"no split 'train'", EVALUATE),
    *damaged("scores-is-a-folder", "evaluation", replace("x"), r"evaluation", EVALUATE),
    # Going on from what is damaged.
    *(
        case
        for id, content in NOT_JSON.items()
        for case in damaged(
            f"go-on-recipe-{id}", "recipe.yaml", replace(content), r"recipe\.yaml", GO_ON
        )
        if id not in ("empty", "null")
    ),
    *(
        Case(
            id=f"resume-{id}",
            argv=train_argv(
                "good", "--set=keep_checkpoints=1", f"--resume={path}", output_dir="run"
            ),
            run=True,
            said=said,
            files=files,
        )
        for id, path, files, said in (
            ("class", "run/class-0-fruit", {}, r"no manifest\.json"),
            ("run", "run", {}, r"no manifest\.json"),
            ("final", "run/class-0-fruit/final", {}, r"it is no checkpoint"),
            ("finished", "run/class-0-fruit/checkpoint-1", {}, r"is trained to the end already"),
            ("best", "run/class-0-fruit/best", {}, r"is trained to the end already"),
            (
                "damaged-weights",
                "run/class-0-fruit/checkpoint-1",
                {"run/class-0-fruit/checkpoint-1/model.safetensors": _Act(flip)},
                r"model\.safetensors has changed",
            ),
            (
                "damaged-optimizer",
                "run/class-0-fruit/checkpoint-1",
                {"run/class-0-fruit/checkpoint-1/optimizer.pt": _Act(flip)},
                r"optimizer\.pt has changed",
            ),
            (
                "damaged-state",
                "run/class-0-fruit/checkpoint-1",
                {"run/class-0-fruit/checkpoint-1/state.json": _Act(cut)},
                r"is damaged",
            ),
            (
                "no-optimizer",
                "run/class-0-fruit/checkpoint-1",
                {"run/class-0-fruit/checkpoint-1/optimizer.pt": _Act(remove)},
                r"optimizer\.pt is missing",
            ),
            (
                "manifest",
                "run/class-0-fruit/checkpoint-1",
                {"run/class-0-fruit/checkpoint-1/manifest.json": _Act(replace("{}"))},
                r"format",
            ),
            ("pickle", "f.pt", {"f.pt": b"\x80\x04N."}, r"give auto, never"),
        )
    ),
]

BINARY = b"\x00\xff" * 300
MODELS: list[Case] = [
    *(
        Case(id=f"model-{id}", argv=train_model(), files=model(config), said=said)
        for id, config, said in (
            ("empty-config", b"", r"configuration of model cannot be loaded"),
            ("binary-config", BINARY, r"configuration of model cannot be loaded"),
            ("list-config", b"[]", r"cannot be loaded"),
            ("null-config", b"null", r"cannot be loaded"),
            ("no-type", {}, r"cannot be loaded"),
            ("unknown-type", {"model_type": "gpt9"}, r"cannot be loaded"),
            ("no-lm", {"model_type": "vit"}, r"cannot be loaded"),
            ("number-type", {"model_type": 3}, r"cannot be loaded"),
            ("words", {**SHAPE, "n_head": "two"}, r"cannot be loaded"),
            ("zero-heads", {**SHAPE, "n_head": 0}, r"cannot be loaded"),
            ("odd-heads", {**SHAPE, "n_head": 3}, r"cannot be loaded"),
            ("negative", {**SHAPE, "n_embd": -16}, r"cannot be loaded"),
            ("no-activation", {**SHAPE, "activation_function": "nope"}, r"cannot be loaded"),
            ("short", {**SHAPE, "n_positions": 8}, r"has 8 positions"),
            (
                "custom-code",
                {**SHAPE, "model_type": "mine", "auto_map": {"AutoConfig": "evil.C"}},
                r"cannot be loaded",
            ),
            ("enormous", {**SHAPE, "n_embd": 2**22, "n_head": 1}, r"memory|cannot be loaded"),
        )
    ),
    *(
        Case(
            id=f"weights-{id}",
            argv=train_model("--set=tokenizer=auto", init="pretrained"),
            files=model(SHAPE, weights, **more),
            said=said,
        )
        for id, weights, more, said in (
            ("none", None, {}, r"holds no \*\.safetensors"),
            ("pickled", None, {"pytorch_model__bin": b"\x80\x04N."}, r"holds no \*\.safetensors"),
            ("empty", b"", {}, r"cannot be loaded|no tokenizer"),
        )
    ),
    *(
        Case(
            id=f"weights-{id}",
            argv=tuple(
                "--set=tokenizer=run/tokenizer" if word == "--set=tokenizer=auto" else word
                for word in train_model("--set=tokenizer=auto", init="pretrained")
            ),
            files=model(SHAPE, weights),
            run=True,
            said=said,
        )
        for id, weights, said in (
            ("no-bytes", b"", r"cannot be loaded"),
            ("short-header", b"\x01\x02", r"cannot be loaded"),
            ("huge-header", struct.pack("<Q", 2**62) + b"{}", r"cannot be loaded"),
            ("no-json", safetensors(b"hello"), r"cannot be loaded"),
            ("json-list", safetensors(b"[]"), r"cannot be loaded"),
            (
                "overlap",
                safetensors(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', b"abcd"),
                r"cannot be loaded",
            ),
            (
                "beyond",
                safetensors(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'),
                r"cannot be loaded",
            ),
            (
                "dtype",
                safetensors(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', b"abcd"),
                r"cannot be loaded",
            ),
            ("pickle", b"\x80\x04N.", r"cannot be loaded"),
            ("zip", b"PK\x03\x04" + bytes(200), r"cannot be loaded"),
        )
    ),
    *(
        Case(
            id=f"tokenizer-{id}",
            argv=tuple(
                "--set=tokenizer=tok" if w == "--set=tokenizer=train" else w
                for w in train_argv("good")
            ),
            files={f"tok/{name}": content for name, content in files.items()} or {"tok": None},
            said=said,
        )
        for id, files, said in (
            ("empty-folder", {}, r"holds no tokenizer"),
            ("empty", {"tokenizer.json": b""}, r"cannot be loaded"),
            ("binary", {"tokenizer.json": BINARY}, r"cannot be loaded"),
            ("object", {"tokenizer.json": "{}"}, r"cannot be loaded"),
            ("list", {"tokenizer.json": "[]"}, r"cannot be loaded"),
            ("deep", {"tokenizer.json": "[" * 50_000}, r"cannot be loaded"),
            (
                "no-model",
                {"tokenizer.json": '{"version": "1.0", "model": null}'},
                r"cannot be loaded",
            ),
            ("vocab-only", {"vocab.json": "{}"}, r"cannot be loaded|no end-of-sequence"),
            (
                "merges",
                {"vocab.json": '{"a": 0}', "merges.txt": b"\xff"},
                r"cannot be loaded|no end",
            ),
            ("model-file", {"tokenizer.model": BINARY}, r"cannot be loaded|not a fast|no end"),
            (
                "custom",
                {
                    "tokenizer.json": "{}",
                    "tokenizer_config.json": json.dumps(
                        {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}
                    ),
                    "evil.py": "open('planted', 'w')",
                },
                r"cannot be loaded",
            ),
            (
                "class",
                {"tokenizer.json": "{}", "tokenizer_config.json": '{"tokenizer_class": 7}'},
                r"cannot be loaded",
            ),
            ("config", {"tokenizer.json": "{}", "tokenizer_config.json": "["}, r"cannot be loaded"),
        )
    ),
]

CASES = [*NO_RUNS, *HALF_RUNS, *DAMAGED, *MODELS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_damage_is_named_in_a_sentence(case: Case, tmp_path: Path, run_template: Path) -> None:
    """Each gives an exit code and a sentence, and changes no file."""
    check_case(case, tmp_path, run_template)
    assert not list(tmp_path.rglob("planted"))


def test_there_are_as_many_as_promised() -> None:
    """No case is written twice."""
    assert len({case.id for case in CASES}) == len(CASES) >= 200
