"""Estimated statistics: held against the documents that a training really gets."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from accel_gpt2.data import estimate
from accel_gpt2.data.estimate import estimate_statistics
from accel_gpt2.data.sources import load_text_data
from accel_gpt2.data.tokenizer import load_gpt2_tokenizer
from accel_gpt2.plan.data import dataset_statistics
from accel_gpt2.recipe import Layer, TrainRecipe
from accel_gpt2.recipe.resolving import resolve
from tests.conftest import write_texts


def _recipe(dataset: Path | str, **values: object) -> TrainRecipe:
    given = {"dataset": str(dataset), "test_split": "none", **values}
    return resolve([Layer(origin="test", values=given)]).recipe


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.csv", documents_per_class=200)


@pytest.mark.parametrize("values", [{}, {"max_length": 16}, {"train_documents_per_class": 50}])
def test_an_estimate_is_near_what_is_trained_on(texts: Path, values: dict[str, object]) -> None:
    """Documents are counted exactly, and lengths are within 4% of the tokenizer's."""
    recipe = _recipe(texts, **values)
    found = estimate_statistics(recipe)
    data = load_text_data(recipe)
    documents = load_gpt2_tokenizer().encode(list(data.train["text"]), recipe.max_length)
    predicted = np.array([len(document.token_ids) - 1 for document in documents], dtype=float)
    assert found is not None
    assert found.num_classes == 3
    assert found.num_train_documents == len(predicted)
    assert found.num_validation_documents == len(data.validation)
    assert found.mean_tokens == pytest.approx(predicted.mean(), rel=0.04)
    assert found.mean_context_tokens == pytest.approx(
        (predicted**2).sum() / predicted.sum(), rel=0.04
    )
    assert str(texts) in found.source


def test_files_are_read_once_until_they_change(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second estimate, also of another recipe, reads nothing; a changed file is read again."""
    path = tmp_path / "texts.csv"
    path.write_bytes(texts.read_bytes())
    before = estimate_statistics(_recipe(path))
    reads = []
    monkeypatch.setattr(
        estimate,
        "_counted",
        lambda recipe, count=estimate._counted: reads.append(1) or count(recipe),
    )
    again = estimate_statistics(_recipe(path, max_length=20))
    assert reads == []
    write_texts(path, documents_per_class=40)
    changed = estimate_statistics(_recipe(path))
    assert reads == [1]
    assert before is not None
    assert again is not None
    assert changed is not None
    assert before.num_train_documents == again.num_train_documents > changed.num_train_documents


def test_a_copy_in_the_data_folder_counts_more_than_the_row(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of a known data set under ACCEL_GPT2_DATA is what is planned for, and so is a file
    that only this folder knows; what is not there keeps its row."""
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news" / "train.csv").write_bytes(texts.read_bytes())
    (tmp_path / "mine.csv").write_bytes(texts.read_bytes())
    monkeypatch.setenv("ACCEL_GPT2_DATA", str(tmp_path))
    read: list[Path] = []
    own = [
        estimate_statistics(
            _recipe(name, class_names=["river", "kitchen", "orbit"]), on_reading=read.append
        )
        for name in ("ag_news", "mine")
    ]
    assert read == [tmp_path / "ag_news", tmp_path / "mine.csv"]
    for found in own:
        assert found is not None
        assert found.num_train_documents < 600
        assert found.num_classes == 3
    assert estimate_statistics(_recipe("imdb")) == dataset_statistics(_recipe("imdb"))


def test_rows_are_not_read_and_the_hub_is_not_asked() -> None:
    """A catalog name gives its row; what is neither here nor in the catalog is not known."""
    recipe = _recipe("imdb")
    assert estimate_statistics(recipe) == dataset_statistics(recipe)
    assert estimate_statistics(_recipe("somebody/else")) is None


def test_estimating_loads_no_torch(texts: Path) -> None:
    """`plan` stays without torch where it has to read the data first."""
    code = (
        "import sys; from accel_gpt2.recipe import TrainRecipe; "
        "from accel_gpt2.data.estimate import estimate_statistics; "
        f"found = estimate_statistics(TrainRecipe(dataset={str(texts)!r}, test_split='none')); "
        "sys.exit(found is None or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
