"""The TF-IDF + logistic regression baseline and the n-gram language models."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from sklearn.datasets import make_multilabel_classification
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from accel_gpt2.classify.baseline import fit_ngram_models, tfidf_logistic_regression

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


class PlainKneserNey:
    """Interpolated modified Kneser-Ney as Chen and Goodman define it, with dictionaries.

    As in KenLM, discounts are fixed where nothing occurs once, twice, three or four times.
    """

    def __init__(self, documents, vocabulary):
        self.uniform = 1 / (len(vocabulary) + 2)  # and the end, and the unknown word
        self.counts = {3: Counter(), 2: Counter(), 1: Counter()}
        for words in documents:
            padded = ["<s>", "<s>", *words, "</s>"]
            self.counts[3].update(zip(padded, padded[1:], padded[2:], strict=False))
        for length in (2, 1):
            self.counts[length].update(ngram[1:] for ngram in self.counts[length + 1])
        self.followers = {length: defaultdict(dict) for length in self.counts}
        for length, counts in self.counts.items():
            for ngram, count in counts.items():
                self.followers[length][ngram[:-1]][ngram[-1]] = count

        self.counts_of_counts = {k: Counter(v.values()) for k, v in self.counts.items()}

    def discount(self, length, count):
        n = self.counts_of_counts[length]
        if not count:
            return 0.0
        if not all(n[k] for k in range(1, 5)):
            return (0.5, 1.0, 1.5)[min(count, 3) - 1]
        y = n[1] / (n[1] + 2 * n[2])
        k = min(count, 3)
        return k - (k + 1) * y * n[k + 1] / n[k]

    def probability(self, word, context, length=3):
        if length == 0:
            return self.uniform
        context = tuple(context)[len(context) - length + 1 :]
        lower = self.probability(word, context, length - 1)
        followers = self.followers[length].get(context)
        if followers is None:
            return lower
        count = followers.get(word, 0)
        freed = sum(self.discount(length, c) for c in followers.values())
        kept = count - self.discount(length, count)
        return (kept + freed * lower) / sum(followers.values())

    def log_likelihood(self, words):
        padded = ["<s>", "<s>", *words, "</s>"]
        return sum(
            math.log(self.probability(padded[i], padded[i - 2 : i])) for i in range(2, len(padded))
        )


def zipfian_documents(num_documents=40, num_words=30, seed=0):
    """Words by Zipf's law, each document in the order of its own two-word habits."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, num_words + 1)
    return [
        [f"word{i}" for i in rng.choice(num_words, size=rng.integers(1, 25), p=p / p.sum())]
        for _ in range(num_documents)
    ]


@pytest.fixture(scope="module")
def ngrams():
    """Models of two classes, and the plain ones, on words of which some occur in one class only."""
    documents = [zipfian_documents(seed=0), zipfian_documents(num_words=20, seed=1)]
    vocabulary = {word for words in itertools.chain(*documents) for word in words}
    labels = [0] * len(documents[0]) + [1] * len(documents[1])
    texts = [" ".join(words) for words in itertools.chain(*documents)]
    plain = [PlainKneserNey(own, vocabulary) for own in documents]
    return fit_ngram_models(texts, labels), plain, sorted(vocabulary)


def test_ngram_likelihoods_equal_the_definition(ngrams):
    """log p(x|c) of new documents, seen ones and the empty one is that of plain dictionaries."""
    models, plain, _ = ngrams
    documents = [*zipfian_documents(20, seed=2), [], ["new", "word1", "new"], ["word29"]]
    result = models.log_likelihoods([" ".join(words) for words in documents])
    # Single words are too few to estimate discounts from; pairs and triples are not.
    assert [model.discount(1, 2) for model in plain] == [1.0, 1.0]
    assert all(model.discount(length, 2) != 1.0 for model in plain for length in (2, 3))
    expected = [[model.log_likelihood(words) for model in plain] for words in documents]
    np.testing.assert_allclose(result, expected, rtol=1e-12)
    assert result.shape == (23, 2)


@pytest.mark.parametrize("length", [0, 1])
def test_all_texts_together_have_probability_one(ngrams, length):
    """Texts of up to so many words, and what the definition leaves for longer ones, sum to one."""
    models, plain, vocabulary = ngrams
    symbols = [*vocabulary, "unknown"]
    total = np.zeros(2)
    for num_words in range(length + 1):
        texts = [" ".join(words) for words in itertools.product(symbols, repeat=num_words)]
        total += np.exp(models.log_likelihoods(texts)).sum(axis=0)
    for index, model in enumerate(plain):
        for words in itertools.product(symbols, repeat=length + 1):
            padded = ["<s>", "<s>", *words]
            steps = range(2, len(padded))
            total[index] += math.prod(
                model.probability(padded[i], padded[i - 2 : i]) for i in steps
            )
    np.testing.assert_allclose(total, 1.0, rtol=1e-12)


def test_ngram_models_learn_the_order_of_words():
    """Two classes of the same words in another order are told apart."""
    rng = np.random.default_rng(0)
    orders = ["red green blue black", "black blue green red"]
    labels = rng.integers(0, 2, 60).tolist()
    models = fit_ngram_models([orders[label] for label in labels], labels)
    assert models.log_likelihoods(orders).argmax(axis=1).tolist() == [0, 1]


def test_documents_do_not_touch():
    """A document's likelihood does not depend on the documents scored beside it."""
    models = fit_ngram_models(FRUIT + TOOLS, [0] * 4 + [1] * 4)
    together = models.log_likelihoods(FRUIT + TOOLS)
    alone = np.concatenate([models.log_likelihoods([text]) for text in FRUIT + TOOLS])
    np.testing.assert_array_equal(together, alone)
    assert together.argmax(axis=1).tolist() == [0] * 4 + [1] * 4


def test_every_text_has_a_probability():
    """No text is impossible: unknown words, no word at all, emoji, capitals."""
    models = fit_ngram_models(["😀 !", "🔧 ?"], [0, 1])
    result = models.log_likelihoods(["nothing known", "", "😀😀", "🔧 ?"])
    assert np.isfinite(result).all()
    assert result[2:].argmax(axis=1).tolist() == [0, 1]
    fruit = fit_ngram_models(FRUIT + TOOLS, [0] * 4 + [1] * 4)
    same = fruit.log_likelihoods(["A Sour APPLE", "a sour apple"])
    np.testing.assert_array_equal(same[0], same[1])
    assert "trained on the 8 training documents" in fruit.description


def test_counts_that_give_negative_discounts():
    """Where most n-grams occur four times the estimated discount is below zero, and not used."""
    texts = [f"word{i}" for i in range(100) for _ in range(4)]
    texts += [f"rare{count}" for count in (1, 2, 3) for _ in range(count)]
    models = fit_ngram_models(texts, [0] * len(texts))
    seen, rare, new = models.log_likelihoods(["word7", "rare1", "unseen"])[:, 0]
    assert 0 > seen > rare > new > -np.inf


def test_a_class_without_documents_has_no_model():
    """Labels that skip a class are a fault of the caller."""
    with pytest.raises(AssertionError, match="no training document"):
        fit_ngram_models(["a", "b"], [0, 2])
