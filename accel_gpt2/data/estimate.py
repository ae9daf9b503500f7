"""How much text local files hold: read once, estimated in tokens, kept.

The texts are really read, by our own sources, so that duplicates and empty documents are gone; only
their length in tokens is an estimate, from a sample. torch is not loaded.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from accel_gpt2.data.cache import cached_file, content_key
from accel_gpt2.data.local_files import find_dataset_files
from accel_gpt2.data.tokenizer import GPT2_VOCABULARY
from accel_gpt2.plan.data import DataStatistics, cut_statistics, dataset_statistics
from accel_gpt2.recipe import TrainRecipe

_FORMAT_VERSION = 1

# Documents that are tokenised for the ratio of bytes to tokens, spread over all: their mean is
# within 1% of that of all on IMDB and AG News.
_SAMPLE_DOCUMENTS = 500

# Bins of a tenth: as fine as the catalog's.
_BIN_RATIO = 1.1

# What decides which documents there are, and in which splits.
_READ_FIELDS = ("text_field", "label_field", "class_names", "train_split", "test_split")


def estimate_statistics(
    recipe: TrainRecipe, *, on_reading: Callable[[Path], None] = lambda path: None
) -> DataStatistics | None:
    """Statistics of local files, which are read once; else of a catalog row; None for the hub's.

    Files come first, because a copy that is here may be a part of what the row counts.

    Args:
        on_reading: told the path before files are read, which takes seconds.

    Raises:
        UserError: when the files cannot be used as labelled documents.
    """
    local = find_dataset_files(recipe.dataset)
    if local is None:
        return dataset_statistics(recipe)
    seen = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for file in local.data_files
    ]
    read_as = [str(getattr(recipe, field)) for field in _READ_FIELDS]

    def count(staged: Path) -> None:
        on_reading(local.path)
        staged.write_text(json.dumps(_counted(recipe)), encoding="utf-8")

    key = content_key("statistics", _FORMAT_VERSION, seen, read_as)
    path = cached_file("statistics", key, ".json", count)
    counted = json.loads(path.read_text(encoding="utf-8"))
    return cut_statistics(
        recipe,
        train_documents=counted["train_documents"],
        num_test_documents=counted["num_test_documents"],
        token_lengths=tuple((n, count) for n, count in counted["lengths"]),
        source=f"{local.path}, read; {counted['bytes_per_token']:.2f} bytes a token",
    )


def _counted(recipe: TrainRecipe) -> dict[str, object]:
    from accel_gpt2.data.sources import load_text_data  # half a second of pyarrow and datasets

    # Without what only cuts: the catalog's figures are of whole data sets too.
    data = load_text_data(dataclasses.replace(recipe, train_documents_per_class=None))
    labels = Counter([*data.train["label"], *data.validation["label"]])
    texts = [*data.train["text"], *data.validation["text"]]
    bytes_per_token = _bytes_per_token(texts[:: max(1, len(texts) // _SAMPLE_DOCUMENTS)])
    bins = Counter[int]()
    for text in texts:
        tokens = max(1.0, len(text.encode()) / bytes_per_token)
        # The middle of its bin, but whole numbers as they are.
        middle = _BIN_RATIO ** round(math.log(tokens, _BIN_RATIO))
        bins[round(tokens if tokens < 1 / (_BIN_RATIO - 1) else middle)] += 1
    return {
        "train_documents": [labels[label] for label in range(len(data.class_names))],
        "num_test_documents": len(data.test),
        "lengths": sorted(bins.items()),
        "bytes_per_token": bytes_per_token,
    }


def _bytes_per_token(texts: Sequence[str]) -> float:
    """Of GPT-2's vocabulary, by the tokenizers library alone: transformers would take seconds."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer(
        str(GPT2_VOCABULARY / "vocab.json"), str(GPT2_VOCABULARY / "merges.txt")
    )
    # As much of a document as could be kept, so that a book does not take a minute.
    heads = [text[:100_000] for text in texts]
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(heads))
    return sum(len(head.encode()) for head in heads) / max(1, tokens)
