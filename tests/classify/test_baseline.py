"""The TF-IDF + logistic regression baseline."""

import numpy as np
import pytest
from sklearn.datasets import make_multilabel_classification
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from accel_gpt2.classify.baseline import tfidf_logistic_regression

FRUIT = ["ripe apple and sweet pear", "a sour apple", "pear cake with apple", "plum and pear jam"]
TOOLS = ["a steel hammer", "hammer and nail", "screw the nail with a drill", "drill and hammer"]


def test_equals_the_standard_pipeline():
    """The probabilities are those of scikit-learn's own pipeline on the same settings."""
    counts, labels = make_multilabel_classification(
        n_samples=1200, n_features=60, n_classes=3, random_state=0
    )
    texts = [" ".join(f"word{j} " * int(n) for j, n in enumerate(row) if n) for row in counts]
    targets = labels.argmax(axis=1).tolist()
    result = tfidf_logistic_regression(texts[:1000], targets[:1000], texts[1000:])

    reference = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2),
        LogisticRegression(C=10.0, max_iter=1000),
    ).fit(texts[:1000], targets[:1000])
    np.testing.assert_allclose(result.probabilities, reference.predict_proba(texts[1000:]))
    np.testing.assert_array_equal(result.predictions, reference.predict(texts[1000:]))
    assert result.seconds > 0
    assert "1,000 training documents" in result.description
    assert "min_df 2" in result.description


def test_works_on_eight_documents():
    """A handful of documents keeps its rare words and is classified by them."""
    result = tfidf_logistic_regression(
        FRUIT + TOOLS, [0] * 4 + [1] * 4, ["apple and plum", "nail and drill"]
    )
    assert result.predictions.tolist() == [0, 1]
    assert "min_df 1" in result.description
    np.testing.assert_allclose(result.probabilities.sum(axis=1), 1.0)


def test_columns_are_class_indices():
    """A class without training documents keeps its column, with probability 0."""
    result = tfidf_logistic_regression(FRUIT + TOOLS, [0] * 4 + [2] * 4, ["a hammer"])
    assert result.probabilities.shape == (1, 3)
    assert result.probabilities[0, 1] == 0.0
    assert result.predictions.tolist() == [2]


@pytest.mark.parametrize("num_copies", [1, 200])
def test_text_without_words_is_read_by_characters(num_copies):
    """Emoji have no words; characters still tell the classes apart."""
    texts = ["😀 😀 !", "😀 ?", "🔧 !", "🔧 🔧 ?"] * 2 * num_copies
    result = tfidf_logistic_regression(texts, [0, 0, 1, 1] * 2 * num_copies, ["😀", "🔧"])
    assert result.predictions.tolist() == [0, 1]
    assert "characters" in result.description
    assert "min_df 1" in result.description
