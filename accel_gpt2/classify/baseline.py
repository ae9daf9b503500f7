"""The simple classifiers that one neural language model per class has to beat."""

import re
import time
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from accel_gpt2.classify.bayes import FloatArray, IntArray

# From this many training documents on, n-grams that occur in one document only are left out.
_MIN_DOCUMENTS_TO_DROP_RARE = 1000
# Word pairs want less shrinkage than scikit-learn's default of 1. Measured test accuracy, 1 and 10:
# AG News (23,652 training documents) 0.894 and 0.901, IMDB 0.896 and 0.907.
_INVERSE_REGULARISATION = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineResult:
    """`predictions` are class indices, [num_documents]; `probabilities` are [num_documents,
    num_classes]; `seconds` is the time to train and to classify."""

    predictions: IntArray
    probabilities: FloatArray
    seconds: float
    description: str


def tfidf_logistic_regression(
    train_texts: Sequence[str],
    train_labels: Sequence[int],
    test_texts: Sequence[str],
    *,
    seed: int = 0,
) -> BaselineResult:
    """TF-IDF of words and word pairs, then logistic regression, on the training documents only.

    The language models see the validation documents to choose checkpoints and to calibrate, never
    to train; so this sees them not at all. Classes are 0 to the highest training label; nothing is
    tuned. Text without a single word (emoji, punctuation) is taken by characters.
    """
    start = time.perf_counter()
    min_df = 2 if len(train_texts) >= _MIN_DOCUMENTS_TO_DROP_RARE else 1
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=min_df, dtype=np.float64
    )
    features = "words and word pairs"
    try:
        train_features = vectorizer.fit_transform(train_texts)
    except ValueError:  # scikit-learn's only complaint about strings: an empty vocabulary
        vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
        features = "one to three characters, for want of words"
        train_features = vectorizer.fit_transform(train_texts)
    classifier = LogisticRegression(C=_INVERSE_REGULARISATION, max_iter=1000, random_state=seed)
    classifier.fit(train_features, train_labels)

    known = classifier.predict_proba(vectorizer.transform(test_texts))
    probabilities = np.zeros((len(test_texts), int(max(train_labels)) + 1))
    probabilities[:, classifier.classes_] = known
    return BaselineResult(
        predictions=probabilities.argmax(axis=1).astype(np.int64),
        probabilities=probabilities,
        seconds=time.perf_counter() - start,
        description=(
            f"TF-IDF ({features}, sublinear, min_df {vectorizer.min_df}, "
            f"{train_features.shape[1]:,} features) + logistic regression "
            f"(C={_INVERSE_REGULARISATION:g}), trained on the {len(train_texts):,} training "
            "documents without the validation documents"
        ),
    )


# Documents are streams of word ids: two starts, the words, one end. With two starts no context
# reaches into the document before.
_START, _END, _UNKNOWN = range(3)
_NUM_RESERVED = 3
_ORDER = 3
# So that three ids fit into one int64; the rarest words of a larger corpus are unknown.
_MAX_WORDS = 2_000_000
# Runs of letters and digits, and every other sign for itself: nothing but white space is lost.
_WORD = re.compile(r"\w+|[^\w\s]")
# What KenLM's --discount_fallback takes where n-grams are too few to estimate discounts from.
_FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """The n-grams of one length that a class has, as codes in ascending order.

    A code is the word ids as digits of one number, so `code // base` is the context. `totals` and
    `freed` are, per context, its count and what discounting took from its n-grams.
    """

    ngrams: IntArray
    discounted: FloatArray
    contexts: IntArray
    totals: IntArray
    freed: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramModels:
    """One trigram language model per class over one vocabulary, that of all classes together."""

    vocabulary: Mapping[str, int]
    levels: tuple[tuple[_Level, ...], ...]  # [classes][n-gram length - 1]
    description: str

    def log_likelihoods(self, texts: Sequence[str]) -> FloatArray:
        """log p(x|c) in nats, [num_documents, num_classes], for Bayes' rule.

        Summed over the words of a document and its end. Case is folded, and a word of no training
        document is one symbol whatever it is, so these are not likelihoods of the exact text.
        """
        stream = _encode(texts, self.vocabulary)
        stops = np.flatnonzero(stream[stream != _START] == _END)
        starts = np.concatenate([[0], stops[:-1] + 1])
        base = _base(self.vocabulary)
        columns = [
            np.add.reduceat(np.log(_word_probabilities(levels, stream, base)), starts)
            for levels in self.levels
        ]
        return np.stack(columns, axis=1)


def fit_ngram_models(train_texts: Sequence[str], train_labels: Sequence[int]) -> NgramModels:
    """Interpolated modified Kneser-Ney trigram models of words, one per class.

    The classical generative classifier (Mesnil et al. 2015, arXiv:1412.5335) with the smoothing of
    Chen and Goodman 1999, interpolated down to the uniform distribution over the vocabulary, so
    that no text has probability zero. Classes are 0 to the highest training label, and each needs a
    document; nothing is tuned.

    >>> models = fit_ngram_models(["ripe pears", "sweet pears", "steel hammers"], [0, 0, 1])
    >>> models.log_likelihoods(["pears", "a hammer of steel"]).argmax(axis=1).tolist()
    [0, 1]
    """
    counts = Counter(word for text in train_texts for word in _words(text))
    words = [word for word, _ in counts.most_common(_MAX_WORDS)]
    vocabulary = {word: index for index, word in enumerate(words, start=_NUM_RESERVED)}
    base = _base(vocabulary)
    texts_by_class: list[list[str]] = [[] for _ in range(max(train_labels) + 1)]
    for text, label in zip(train_texts, train_labels, strict=True):
        texts_by_class[label].append(text)
    assert all(texts_by_class), "a class has no training document"
    return NgramModels(
        vocabulary=vocabulary,
        levels=tuple(_fit_levels(_encode(texts, vocabulary), base) for texts in texts_by_class),
        description=(
            f"one trigram language model of words per class (interpolated modified Kneser-Ney, "
            f"{len(vocabulary):,} words and punctuation marks, case folded) and Bayes' rule, "
            f"trained on the {len(train_texts):,} training documents without the validation "
            "documents"
        ),
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _base(vocabulary: Mapping[str, int]) -> int:
    return len(vocabulary) + _NUM_RESERVED


def _encode(texts: Sequence[str], vocabulary: Mapping[str, int]) -> IntArray:
    ids = array("q")
    for text in texts:
        ids.extend([_START] * (_ORDER - 1))
        ids.extend([vocabulary.get(word, _UNKNOWN) for word in _words(text)])
        ids.append(_END)
    return np.frombuffer(ids, dtype=np.int64)


def _codes(stream: IntArray, base: int, length: int) -> IntArray:
    """The n-gram of this length that ends at each predicted word, [num_words]."""
    ends = np.flatnonzero(stream != _START)
    codes = np.zeros(len(ends), dtype=np.int64)
    for distance in reversed(range(length)):
        codes = codes * base + stream[ends - distance]
    return codes


def _fit_levels(stream: IntArray, base: int) -> tuple[_Level, ...]:
    levels: list[_Level] = []
    for length in range(_ORDER, 0, -1):
        # Below the longest an n-gram counts once for each different word that goes before it: how
        # well it follows what was not seen, not how often it is there ("Francisco").
        codes = levels[0].ngrams % base**length if levels else _codes(stream, base, length)
        ngrams, counts = np.unique(codes, return_counts=True)
        discounts = np.array([0.0, *_discounts(counts)])[np.minimum(counts, 3)]
        contexts, first = np.unique(ngrams // base, return_index=True)
        levels.insert(
            0,
            _Level(
                ngrams=ngrams,
                discounted=counts - discounts,
                contexts=contexts,
                totals=np.add.reduceat(counts, first),
                freed=np.add.reduceat(discounts, first),
            ),
        )
    return tuple(levels)


def _discounts(counts: IntArray) -> tuple[float, ...]:
    """What is taken from n-grams that occur once, twice, and more often."""
    once, twice, three, four = (int(np.sum(counts == count)) for count in (1, 2, 3, 4))
    if not (once and twice and three and four):
        return _FALLBACK_DISCOUNTS
    ratio = once / (once + 2 * twice)
    discounts = (
        1 - 2 * ratio * twice / once,
        2 - 3 * ratio * three / twice,
        3 - 4 * ratio * four / three,
    )
    return discounts if min(discounts) > 0 else _FALLBACK_DISCOUNTS


def _word_probabilities(levels: Sequence[_Level], stream: IntArray, base: int) -> FloatArray:
    """p(word | the two before it) at every predicted word, [num_words]."""
    num_words = np.count_nonzero(stream != _START)
    probabilities = np.full(num_words, 1 / (base - 1))  # everything but the start can come next
    for length, level in enumerate(levels, start=1):
        codes = _codes(stream, base, length)
        ngram, is_ngram = _find(level.ngrams, codes)
        context, is_context = _find(level.contexts, codes // base)
        seen = np.where(is_ngram, level.discounted[ngram], 0.0)
        mixed = (seen + level.freed[context] * probabilities) / level.totals[context]
        probabilities = np.where(is_context, mixed, probabilities)
    return probabilities


def _find(ascending: IntArray, wanted: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Where each is, and whether it is there at all."""
    index = np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)
    return index, ascending[index] == wanted
