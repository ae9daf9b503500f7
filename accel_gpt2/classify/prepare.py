"""The text and tokens of a run, ready to train on."""

from dataclasses import dataclass

import numpy as np

from accel_gpt2.classify.run import PREPARE_LOCK
from accel_gpt2.data.cache import cache_directory
from accel_gpt2.data.sources import TextData, load_text_data
from accel_gpt2.data.tokenized import Texts, TokenizedDocuments, tokenize_documents
from accel_gpt2.data.tokenizer import TextTokenizer, load_tokenizer
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.processes import one_process_at_a_time


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """The run's text and its tokens."""

    text: TextData
    tokenizer: TextTokenizer
    train: TokenizedDocuments
    validation: TokenizedDocuments

    @property
    def class_counts(self) -> list[int]:
        """Training documents of each class."""
        counts = np.bincount(self.train.labels, minlength=len(self.text.class_names))
        return [int(count) for count in counts]


def prepare_data(recipe: TrainRecipe, *, progress: bool) -> PreparedData:
    """Read, clean, split and tokenise the recipe's training data, or take it from the cache.

    It happens before the processes meet, so that no collective waits for it; the first process of
    a machine does the work and the others read its cache.
    """
    with one_process_at_a_time(cache_directory() / PREPARE_LOCK):
        text = load_text_data(recipe, progress=progress)
        tokenizer = load_tokenizer(recipe, Texts(text.train), progress=progress)
        train, validation = (
            tokenize_documents(
                split, tokenizer, recipe.max_length, description=name, progress=progress
            )
            for name, split in (("train", text.train), ("validation", text.validation))
        )
    return PreparedData(text=text, tokenizer=tokenizer, train=train, validation=validation)
