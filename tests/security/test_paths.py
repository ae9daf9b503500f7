"""Nothing is written outside the run directory and the cache, whatever a name or a link says."""

import json
import shutil
from pathlib import Path

import pytest

from tests.fuzz.harness import (
    Case,
    check_any_outcome,
    good_rows,
    make_workshop,
    run_command,
    train_argv,
    tree_digest,
)

GO_ON = train_argv("good", "--set=keep_checkpoints=1", output_dir="run")


def outside(folder: Path) -> Path:
    """A folder beside the working directory that nobody asked to change."""
    path = folder / "outside"
    path.mkdir()
    (path / "precious.txt").write_text("keep me")
    (path / "checkpoint-1").mkdir()
    (path / "checkpoint-1" / "model.safetensors").write_bytes(b"precious")
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("../../x", "/etc/passwd"),
        ("..", "."),
        ("a/../../../b", "~/c"),
        ("con", "nul"),
        ("\u2025/\u2025", "\uff0e\uff0e\uff0f"),
        ("C:\\x", "\\\\server\\share"),
        ("a\x1b[2Jb", "x\ny"),
        ("-rf", "--"),
        ("e\u0301" * 90, "%2e%2e%2f"),
    ],
    ids=range(9),
)
def test_class_names_never_leave_the_run_directory(
    names: tuple[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Labels that are paths become names of folders like all others, and a run with them works.

    Without --torture only one of them is evaluated and reported as well.
    """
    work = tmp_path / "work"
    work.mkdir()
    keep = outside(tmp_path)
    make_workshop(work, Case(id="", argv=(), said=""), None)
    pairs = [(text, names[label == "tools"]) for text, label in good_rows()]
    (work / "x.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs)
    )
    before = tree_digest(work)
    kept = tree_digest(keep)
    ended = run_command(train_argv("x.jsonl"), cwd=work)
    assert ended.exit_code == 0, ended.stderr
    assert "\x1b" not in ended.stderr
    verbs = [("predict", "out", "a pear"), ("evaluate", "out", "--quiet"), ("report", "out")]
    whole = "\x1b" in names[0] or request.config.getoption("--torture")
    for verb in verbs if whole else verbs[:1]:
        told = run_command(("accel-gpt2", *verb), cwd=work)
        assert told.exit_code == 0, told.stderr
        assert "\x1b" not in told.stderr + told.stdout
    after = tree_digest(work)
    assert {key.partition("/")[0] for key in after.keys() - before.keys()} == {"out"}
    assert tree_digest(keep) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "work"]


@pytest.mark.parametrize(
    "link",
    [
        "class-0-fruit/best",
        "class-0-fruit/checkpoint-1",
        "class-0-fruit/checkpoint-7",
        "class-0-fruit/final",
        "class-0-fruit/validation_scores",
        "class-0-fruit/.staging-checkpoint-1-1",
        "class-0-fruit/superseded-checkpoint-1",
        "tokenizer",
    ],
)
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_link_out_of_the_run_is_not_followed_to_remove_or_overwrite(
    link: str, resume: str, tmp_path: Path, run_template: Path
) -> None:
    """Links that lead out, under every name that a start reads, replaces or cleans up: what they
    lead to stays as it is."""
    work = tmp_path / "work"
    work.mkdir()
    keep = outside(tmp_path)
    make_workshop(work, Case(id="", argv=(), said=""), run_template)
    shutil.rmtree(work / "run" / "class-0-fruit" / "final")
    path = work / "run" / link
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    target = keep / "checkpoint-1" if "checkpoint" in link else keep
    path.symlink_to(target)
    kept = tree_digest(keep)
    ended = run_command((*GO_ON, f"--resume={resume}"), cwd=work)
    check_any_outcome(ended)
    left = tree_digest(keep)
    assert {key: left.get(key) for key in kept} == kept


@pytest.mark.parametrize("name", ["../../outside/precious.txt", "/etc/hostname", "a/../../x"])
def test_a_manifest_names_only_files_of_its_own_folder(
    name: str, tmp_path: Path, run_template: Path
) -> None:
    """A path that climbs out of a checkpoint is damage, whatever is there."""
    work = tmp_path / "work"
    work.mkdir()
    keep = outside(tmp_path)
    make_workshop(work, Case(id="", argv=(), said=""), run_template)
    manifest = work / "run" / "class-0-fruit" / "final" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][name] = {"bytes": 7, "sha256": "0" * 64}
    manifest.write_text(json.dumps(content))
    kept = tree_digest(keep)
    ended = run_command(("accel-gpt2", "predict", "run", "a pear"), cwd=work)
    assert ended.exit_code == 1
    assert "leads out of it" in ended.stderr
    assert tree_digest(keep) == kept


def test_an_evaluation_of_other_data_stays_in_the_run(tmp_path: Path, run_template: Path) -> None:
    """Its folder is named after a path and a split, and lies in the run directory all the same."""
    work = tmp_path / "work"
    (work / "deep" / "er").mkdir(parents=True)
    make_workshop(work, Case(id="", argv=(), said=""), run_template)
    shutil.copytree(work / "good", tmp_path / "other")
    before = set(tree_digest(tmp_path))
    argv = ("accel-gpt2", "evaluate", "run", "--quiet", "--dataset=../other", "--split=test")
    ended = run_command(argv, cwd=work)
    assert ended.exit_code == 0, ended.stderr
    new = set(tree_digest(tmp_path)) - before
    assert new
    assert all(path.startswith("work/run/evaluation-") for path in new if "run.lock" not in path)
