"""How much text there is: what a plan's steps and seconds are computed from."""

import bisect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from accel_gpt2.catalog.datasets import DATASETS, TokenLengths, find_dataset
from accel_gpt2.recipe import TrainRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class DataStatistics:
    """A data set as a recipe cuts it: its documents, and their length in tokens.

    Document counts are of all classes together. `mean_tokens` are predicted tokens per training
    document (BOS is not predicted, EOS is), cut at the recipe's `max_length`; `mean_context_tokens`
    is sum L^2 / sum L of the same lengths: the sequence length that the average token sees.
    `longest_tokens` counts BOS and EOS. `lengths` are pairs of predicted tokens and documents that
    have about so many; where they are empty all documents count as of mean length. `source` says
    where the numbers come from.
    """

    num_classes: int
    num_train_documents: int
    num_validation_documents: int
    num_test_documents: int
    mean_tokens: float
    mean_context_tokens: float
    longest_tokens: int
    source: str
    lengths: TokenLengths = ()


def dataset_statistics(recipe: TrainRecipe) -> DataStatistics | None:
    """The statistics of a data set that has a catalog row; None where it would have to be read.

    A data set of the catalog under other split names is not what was counted, and gives None too.

    >>> found = dataset_statistics(TrainRecipe(dataset="ag_news", max_length=128))
    >>> found.num_train_documents, round(found.mean_tokens), found.longest_tokens
    (118000, 53, 128)
    """
    row = find_dataset(recipe.dataset)
    if row is None or recipe.train_split != "train" or recipe.test_split not in {"test", "none"}:
        return None
    train, test = row.train_documents, row.test_documents
    if recipe.test_split == "none" and row.test_fraction:  # nothing is cut from the only split
        train = tuple(map(sum, zip(train, test, strict=True)))
    return cut_statistics(
        recipe,
        train_documents=train,
        num_test_documents=0 if recipe.test_split == "none" else sum(test),
        token_lengths=row.token_lengths,
        trained_vocabularies=row.trained_vocabularies,
        source=f"catalog row {row.name}: {row.statistics_source}",
    )


def _tokens_per_gpt2_token(
    recipe: TrainRecipe, trained_vocabularies: Sequence[tuple[int, float]]
) -> tuple[float, str]:
    """How many tokens of the recipe's vocabulary stand for one of GPT-2's, and a word on it."""
    if recipe.tokenizer != "train":
        known = recipe.tokenizer == "auto"  # RoBERTa's vocabulary is GPT-2's, in another order
        return 1.0, "" if known else f"; taken as GPT-2's tokens, not {recipe.tokenizer}'s"
    sizes = [math.log(size) for size, _ in trained_vocabularies]
    ratios = [ratio for _, ratio in trained_vocabularies]
    size = math.log(recipe.tokenizer_vocab_size)
    # Straight lines over log(size), the outer ones prolonged.
    right = min(max(bisect.bisect(sizes, size), 1), len(sizes) - 1)
    slope = (ratios[right] - ratios[right - 1]) / (sizes[right] - sizes[right - 1])
    ratio = max(0.5, ratios[right] + slope * (size - sizes[right]))
    return ratio, f"; {ratio:.2f} trained tokens for each of GPT-2's"


def cut_statistics(
    recipe: TrainRecipe,
    *,
    train_documents: Sequence[int],
    num_test_documents: int,
    token_lengths: TokenLengths,
    trained_vocabularies: Sequence[tuple[int, float]] = DATASETS["imdb"].trained_vocabularies,
    source: str,
) -> DataStatistics:
    """What the recipe's validation split, limits and truncation leave of a data set.

    Args:
        train_documents: of each class, before the validation split is cut.
        token_lengths: pairs of GPT-2's tokens, without BOS and EOS, and the documents that have
            about so many; any number of documents, only shares count.
        trained_vocabularies: as in `DatasetSpec`, read where the recipe trains a tokenizer; by
            default that of IMDB's English.

    >>> small = cut_statistics(TrainRecipe(max_length=10), train_documents=[60, 40],
    ...     num_test_documents=0, token_lengths=((4, 1), (98, 1)), source="")
    >>> small.num_train_documents, small.num_validation_documents, small.mean_tokens
    (90, 10, 7.0)
    """
    total = sum(train_documents)
    wanted = min(int(recipe.validation_fraction * total), recipe.validation_documents)
    wanted = max(len(train_documents), wanted)
    # As data.cleaning.split_validation cuts it.
    held_out = [min(max(round(wanted * count / total), 1), count - 1) for count in train_documents]
    limit = recipe.train_documents_per_class or total
    kept = [min(count - out, limit) for count, out in zip(train_documents, held_out, strict=True)]
    ratio, vocabulary = _tokens_per_gpt2_token(recipe, trained_vocabularies)
    cut = Counter[int]()
    for n, count in token_lengths:
        cut[min(max(1, round(n * ratio)), recipe.max_length - 2) + 1] += count
    predicted = tuple(cut.items())
    documents = sum(count for _, count in predicted)
    tokens = sum(n * count for n, count in predicted)
    return DataStatistics(
        num_classes=len(train_documents),
        num_train_documents=sum(kept),
        num_validation_documents=sum(held_out),
        num_test_documents=num_test_documents,
        mean_tokens=tokens / documents,
        mean_context_tokens=sum(n * n * count for n, count in predicted) / tokens,
        longest_tokens=max(n for n, _ in predicted) + 1,
        source=f"{source}{vocabulary}",
        lengths=predicted,
    )


def length_statistics(lengths: Sequence[int], *, source: str) -> DataStatistics:
    """Of the documents of one model: lengths in tokens, BOS and EOS included.

    >>> length_statistics([6, 12], source="two documents").mean_tokens
    8.0
    """
    tokens = sum(lengths) - len(lengths)
    return DataStatistics(
        num_classes=1,
        num_train_documents=len(lengths),
        num_validation_documents=0,
        num_test_documents=0,
        mean_tokens=tokens / len(lengths),
        mean_context_tokens=sum((n - 1) ** 2 for n in lengths) / tokens,
        longest_tokens=max(lengths),
        source=source,
        lengths=tuple(Counter(n - 1 for n in lengths).items()),
    )
