"""Does an entry notice text of another kind? Scores of another data set's documents, judged."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from accel_gpt2.catalog.arms import ArmSpec
from accel_gpt2.classify.curves import out_of_distribution_aurocs
from accel_gpt2.classify.entry_scores import read_scores
from accel_gpt2.classify.evaluations import OUT_OF_DISTRIBUTION
from accel_gpt2.classify.run import open_run
from accel_gpt2.classify.scores import InMemoryDocuments, score_texts
from accel_gpt2.data.sources import load_text_data
from accel_gpt2.durable import write_json
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.model import load_final_tokenizer
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.progress import TrainProgress

MOST_DOCUMENTS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherTexts:
    """Documents of another data set, whatever their classes there are."""

    dataset: str
    texts: list[str]


def read_other_texts(dataset: str, *, progress: bool = False) -> OtherTexts:
    """At most 2,000 of a data set's test documents, always the same ones.

    Raises:
        UserError: when the data set cannot be had.
    """
    recipe = dataclasses.replace(TrainRecipe(), dataset=dataset)
    texts: list[str] = load_text_data(recipe, progress=progress).test["text"][:]
    chosen = np.random.default_rng(0).permutation(len(texts))[:MOST_DOCUMENTS]
    return OtherTexts(dataset=dataset, texts=[texts[index] for index in sorted(chosen)])


def judge_trained(
    run_directory: Path, arm: ArmSpec, others: OtherTexts, *, quiet: bool = False
) -> None:
    """Score the other texts under a trained run, and write how far they stand apart.

    Raises:
        UserError: when the run or its evaluation is damaged.
    """
    run = open_run(run_directory)
    with TrainProgress(shown=True, quiet=quiet) as progress:
        scores = score_texts(run, others.texts, build_accelerator(run.recipe), progress)
    tokenizer = load_final_tokenizer(run.finals[0])
    documents = InMemoryDocuments(tokenizer.encode(others.texts, run.recipe.max_length))
    write_out_of_distribution(run_directory, arm, others, scores.values, documents.lengths - 1)


def write_out_of_distribution(
    run_directory: Path,
    arm: ArmSpec,
    others: OtherTexts,
    other_scores: npt.ArrayLike,
    other_num_tokens: npt.ArrayLike,
) -> None:
    """Set the other texts' scores, [documents, classes], against those of the test split.

    Raises:
        UserError: when the evaluation of the test split is damaged.
    """
    own = read_scores(run_directory, arm)
    aurocs = out_of_distribution_aurocs(
        own.scores,
        own.num_tokens,
        other_scores,
        other_num_tokens,
        own.log_prior,
        own.calibration,
        posteriors_only=own.is_posterior,
    )
    write_json(
        run_directory / arm.evaluation / OUT_OF_DISTRIBUTION,
        {"dataset": others.dataset, **aurocs},
    )
