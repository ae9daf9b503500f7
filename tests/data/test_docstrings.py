"""The embedded data set: found without imports, the same every time."""

import subprocess
import sys
from pathlib import Path

import pytest

from accel_gpt2.data import docstrings
from accel_gpt2.data.docstrings import read_docstrings
from accel_gpt2.data.sources import check_data_available, load_text_data
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe

_SOURCE = b'''"""A module docstring that is long enough to be a document of its own, all told."""
import os
def short():
    """Too short."""
class Thing:
    r"""A class docstring with an invalid escape \\d in it, which must not warn anybody at all.

        Indented by its class.
    """
    async def run(self):
        """A coroutine's docstring, of a length that makes it a document beyond any doubt."""
    value = "a string that is not a docstring, however long it may be, is not a document here"
'''


def test_which_docstrings_of_a_file_are_documents(tmp_path: Path) -> None:
    """Modules, classes and functions count, dedented, from 60 characters on; no other string."""
    file = tmp_path / "x.py"
    file.write_bytes(_SOURCE)
    found = sorted(docstrings._docstrings(file))
    assert [line for line, _ in found] == [1, 5, 10]
    assert found[1][1].endswith("at all.\n\nIndented by its class.")
    file.write_bytes(b'"""' + b"broken " * 20 + b'"""\nclass {{ name }}:')
    assert list(docstrings._docstrings(file)) == []


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Forty documents per class, so that a test takes no longer than its claim needs."""
    monkeypatch.setattr(docstrings, "MAX_DOCUMENTS_PER_CLASS", 40)
    return 40


def test_two_readings_are_equal(few: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Read again from the source files, the documents are the same, forty different per class."""
    first = read_docstrings()
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(tmp_path / "another cache"))
    second = read_docstrings()
    assert first.table.equals(second.table)
    by_class = first.table.group_by("label").aggregate([("text", "count_distinct")]).to_pydict()
    assert dict(
        zip(by_class["label"], by_class["text_count_distinct"], strict=True)
    ) == dict.fromkeys(docstrings._MODULES, few)
    file, _, line = first.place(0).partition(", line ")
    assert file.startswith("torch/")
    assert int(line) >= 1


def test_they_are_a_data_set_like_any_other(few: int) -> None:
    """They are treated alike: no text twice, none in two splits, every class in each."""
    check_data_available(TrainRecipe(dataset="docstrings"))
    data = load_text_data(TrainRecipe(dataset="docstrings"))
    texts = [*data.train["text"], *data.validation["text"], *data.test["text"]]
    assert len(set(texts)) == len(texts) > 140
    assert data.class_names == ("torch", "transformers", "pandas", "scikit-learn")
    for split in (data.train, data.validation, data.test):
        assert set(split["label"]) == {0, 1, 2, 3}


def test_a_second_reading_parses_nothing(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read is kept for as long as the four versions stay the same."""
    first = read_docstrings()
    monkeypatch.setattr(docstrings, "_source_files", lambda root: pytest.fail("parsed again"))
    assert read_docstrings().table.equals(first.table)


def test_nothing_is_imported() -> None:
    """Reading them loads neither torch nor transformers nor scikit-learn."""
    code = (
        "import sys\n"
        "from accel_gpt2.data import docstrings\n"
        "docstrings.MAX_DOCUMENTS_PER_CLASS = 3\n"
        "assert len(docstrings.read_docstrings().table) >= 12\n"
        "print(sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says which of the four is missing and how to install it."""
    modules = {**docstrings._MODULES, "pandas-not-here": "pandas_not_here"}
    monkeypatch.setattr(docstrings, "_MODULES", modules)
    with pytest.raises(UserError, match="pandas-not-here is not installed; run `pip install"):
        check_data_available(TrainRecipe(dataset="docstrings"))
