"""How much text there is: what a plan's steps and seconds are computed from."""

from dataclasses import dataclass

from accel_gpt2.recipe import TrainRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class DataStatistics:
    """A data set as a recipe cuts it: its documents, and their length in tokens.

    Document counts are of all classes together. `mean_tokens` are predicted tokens per training
    document (BOS is not predicted, EOS is), cut at the recipe's `max_length`; `mean_context_tokens`
    is sum L^2 / sum L of the same lengths: the sequence length that the average token sees.
    `longest_tokens` counts BOS and EOS. `source` says where the numbers come from.
    """

    num_classes: int
    num_train_documents: int
    num_validation_documents: int
    num_test_documents: int
    mean_tokens: float
    mean_context_tokens: float
    longest_tokens: int
    source: str


def dataset_statistics(recipe: TrainRecipe) -> DataStatistics | None:
    """The statistics of a data set that has a catalog row; None where it would have to be read."""
    raise NotImplementedError(recipe)
