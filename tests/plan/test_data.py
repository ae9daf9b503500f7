"""Data statistics: held against what counting every document gave."""

import pytest

from accel_gpt2.catalog.datasets import DATASETS
from accel_gpt2.data.cleaning import split_validation
from accel_gpt2.plan.data import dataset_statistics, length_statistics
from accel_gpt2.recipe import Layer, TrainRecipe
from accel_gpt2.recipe.resolving import resolve

# Mean predicted tokens and sum L^2 / sum L of all training documents, exactly, by max_length:
# what benchmarks/token_lengths.py prints.
EXACT = {
    ("sms_spam", 128): (23.31, 34.47),
    ("sms_spam", 1024): (23.40, 35.70),
    ("docstrings", 128): (86.91, 109.36),
    ("docstrings", 256): (131.92, 198.59),
    ("docstrings", 1024): (227.35, 568.91),
    ("ag_news", 128): (53.23, 58.81),
    ("ag_news", 1024): (53.56, 60.47),
    ("imdb", 128): (122.42, 124.29),
    ("imdb", 256): (203.23, 220.02),
    ("imdb", 512): (266.59, 338.62),
    ("imdb", 1024): (297.36, 446.12),
}


def _recipe(**values: object) -> TrainRecipe:
    return resolve([Layer(origin="test", values=values)]).recipe


def test_every_row_is_counted() -> None:
    """Each data set of the catalog has exact figures above, and says how it was counted."""
    assert {name for name, _ in EXACT} == set(DATASETS)
    assert all(row.statistics_source for row in DATASETS.values())


@pytest.mark.parametrize(("name", "max_length"), EXACT)
def test_means_are_right_at_any_truncation(name: str, max_length: int) -> None:
    """The bins give the mean length and the mean context of truncated documents within 1%."""
    found = dataset_statistics(_recipe(dataset=name, max_length=max_length))
    assert found is not None
    mean, context = EXACT[name, max_length]
    assert found.mean_tokens == pytest.approx(mean, rel=0.01)
    assert found.mean_context_tokens == pytest.approx(context, rel=0.01)
    assert found.longest_tokens <= max_length


def test_rows_count_each_document_once() -> None:
    """Bins hold as many documents as the classes do, but where a sample was counted."""
    for row in DATASETS.values():
        counted = sum(count for _, count in row.token_lengths)
        if row.name == "ag_news":
            assert counted == 23_652
        else:
            assert counted == sum(row.train_documents)
        if row.class_names:
            assert len(row.class_names) == len(row.train_documents) == len(row.test_documents)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"validation_fraction": 0.001},
        {"validation_documents": 10},
        {"train_documents_per_class": 100},
        {"train_documents_per_class": 100_000},
    ],
)
def test_splits_are_those_of_the_data_package(values: dict[str, object]) -> None:
    """Training and validation documents are as many as the real cut leaves, for any limit."""
    import numpy as np

    recipe = _recipe(dataset="sms_spam", **values)
    counts = DATASETS["sms_spam"].train_documents
    labels = np.repeat(np.arange(len(counts)), counts)
    digests = np.arange(2 * len(labels), dtype=np.uint64).reshape(-1, 2)
    wanted = int(recipe.validation_fraction * len(labels))
    train, validation = split_validation(
        digests,
        labels,
        num_validation=max(len(counts), min(wanted, recipe.validation_documents)),
        train_per_class=recipe.train_documents_per_class,
        seed=0,
    )
    found = dataset_statistics(recipe)
    assert found is not None
    assert found.num_train_documents == len(train)
    assert found.num_validation_documents == len(validation)


def test_a_vocabulary_of_its_own_makes_other_tokens() -> None:
    """A trained vocabulary of 4,096 has a third more tokens on AG News, and one of 16,384 hardly
    more than GPT-2's; between the measured sizes the ratio lies between theirs."""
    plain = dataset_statistics(_recipe(dataset="ag_news", model="gpt2"))
    assert plain is not None
    ratios = []
    for size in (4096, 6000, 8192, 16384):
        found = dataset_statistics(
            _recipe(
                dataset="ag_news",
                model="gpt2-tiny",
                max_length=512,
                tokenizer_vocab_size=size,
            )
        )
        assert found is not None
        assert "trained tokens" in found.source
        ratios.append((found.mean_tokens - 1) / (plain.mean_tokens - 1))
    assert ratios[0] == pytest.approx(1.326, rel=0.01)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[3] == pytest.approx(1.026, rel=0.01)


def test_what_has_no_row_is_not_known() -> None:
    """Another data set, or other splits of a known one, would have to be read first."""
    assert dataset_statistics(_recipe(dataset="somebody/else")) is None
    assert dataset_statistics(_recipe(dataset="imdb", train_split="unsupervised")) is None
    by_hub_id = dataset_statistics(_recipe(dataset="stanfordnlp/imdb"))
    assert by_hub_id == dataset_statistics(_recipe(dataset="imdb"))
    without_test = dataset_statistics(_recipe(dataset="sms_spam", test_split="none"))
    assert without_test is not None
    assert without_test.num_test_documents == 0
    assert without_test.num_train_documents + without_test.num_validation_documents == 5171


def test_lengths_of_real_documents_have_the_same_moments() -> None:
    """Statistics of documents at hand follow their definition."""
    found = length_statistics([11, 21, 31], source="here")
    assert found.mean_tokens == 20
    assert found.mean_context_tokens == pytest.approx((100 + 400 + 900) / 60)
    assert found.longest_tokens == 31
