"""What an entry of a comparison says about each test document, read back from its run directory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from accel_gpt2.catalog.arms import ArmSpec
from accel_gpt2.classify.bayes import FloatArray, IntArray
from accel_gpt2.classify.calibration import Calibration, calibrated_log_probabilities
from accel_gpt2.classify.curves import accuracy_by_tokens_read
from accel_gpt2.classify.run import CALIBRATION, open_run
from accel_gpt2.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryScores:
    """The test documents in the order of their split, under one entry.

    `scores` are log p(x|c), or log p(c|x) where `is_posterior`, in nats, [documents, classes];
    `token_log_likelihoods` has a flat array per class, and is empty where none are kept.
    """

    labels: IntArray
    num_tokens: IntArray
    predictions: IntArray
    scores: FloatArray
    is_posterior: bool
    log_prior: FloatArray
    calibration: Calibration
    token_log_likelihoods: tuple[NDArray[np.float32], ...]

    @property
    def log_probabilities(self) -> FloatArray:
        """Calibrated log p(c|x) in nats, [documents, classes]."""
        return calibrated_log_probabilities(
            self.calibration, self.scores, self.log_prior, self.num_tokens
        )


def read_scores(run_directory: Path, arm: ArmSpec) -> EntryScores:
    """What the evaluation of an entry's run has left.

    Raises:
        UserError: when it is damaged.
    """
    folder = run_directory / arm.evaluation
    try:
        table = pq.read_table(folder / "scores.parquet")
        names = table.column_names
        is_posterior = "log_probability_0" in names
        column = "log_probability" if is_posterior else "log_likelihood"
        num_classes = sum(name.startswith(f"{column}_") for name in names)
        scores = np.stack(
            [table[f"{column}_{index}"].to_numpy() for index in range(num_classes)], axis=1
        )
        token_files = [folder / f"token_log_likelihoods-{i}.npy" for i in range(num_classes)]
        tokens = tuple(
            np.load(file, mmap_mode="r", allow_pickle=False)
            for file in token_files
            if file.is_file()
        )
        if arm.trained:
            log_prior = open_run(run_directory).log_prior
        else:
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            log_prior = np.array(metrics["log_prior"], dtype=np.float64)
        calibration = folder / CALIBRATION  # of an estimate, which another one would not fit
        if not calibration.is_file():
            calibration = run_directory / CALIBRATION
        return EntryScores(
            labels=table["label"].to_numpy(),
            num_tokens=table["num_tokens"].to_numpy(),
            predictions=table["prediction"].to_numpy(),
            scores=scores,
            is_posterior=is_posterior,
            log_prior=log_prior,
            calibration=Calibration.read(calibration, num_classes),
            token_log_likelihoods=tokens if len(tokens) == num_classes else (),
        )
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{folder} is damaged ({error}): remove it and start the comparison again, which "
            "evaluates that run anew."
        ) from error


def tokens_read(scores: EntryScores) -> list[dict[str, Any]] | None:
    """Accuracy against the document's tokens that are read; None without per-token scores."""
    if not scores.token_log_likelihoods:
        return None
    return accuracy_by_tokens_read(
        scores.token_log_likelihoods, scores.num_tokens, scores.labels, scores.log_prior
    )
