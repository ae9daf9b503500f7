"""`export` on the command line: what it prints, and how it refuses."""

import json
from pathlib import Path

import pytest

from accel_gpt2.classify.fit import fit
from tests.classify.conftest import resolve_tiny

from .conftest import CommandLine


@pytest.fixture(scope="module")
def run(texts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_GPT2_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        directory = tmp_path_factory.mktemp("runs") / "short"
        fit(resolve_tiny(texts_file, max_steps=2), directory, quiet=True)
    return directory


def test_export_prints_one_document(run: Path, tmp_path: Path, accel_gpt2: CommandLine) -> None:
    """With --json stdout holds the directories alone, and they are there."""
    done = accel_gpt2("export", str(run), "--output-dir", "out", "--dtype", "bf16", "--json")
    assert done.returncode == 0
    models = json.loads(done.stdout)["models"]
    assert [model["kind"] for model in models] == ["model"] * 3
    assert {model["dtype"] for model in models} == {"bfloat16"}
    for model in models:
        assert (tmp_path / model["directory"] / "config.json").is_file()


def test_export_into_the_run_by_default_and_once(run: Path, accel_gpt2: CommandLine) -> None:
    """RUN/export gets one class; a second time it is refused with exit code 1."""
    arguments = ("export", str(run), "--class", "orbit")
    assert accel_gpt2(*arguments).returncode == 0
    (folder,) = (run / "export").iterdir()
    assert folder.name.startswith("class-1-")
    again = accel_gpt2(*arguments)
    assert again.returncode == 1
    assert "is there already and is left as it is" in " ".join(again.stderr.split())


def test_export_of_no_run_is_a_usage_error(tmp_path: Path, accel_gpt2: CommandLine) -> None:
    """A folder without a recipe is no run."""
    done = accel_gpt2("export", str(tmp_path))
    assert done.returncode == 2
    assert "is not a run directory" in " ".join(done.stderr.split())
