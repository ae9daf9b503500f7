"""What the classes' models say together about the validation documents."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from accel_gpt2.classify.bayes import log_priors, predict
from accel_gpt2.classify.calibration import fit_calibration
from accel_gpt2.classify.prepare import PreparedData
from accel_gpt2.classify.run import (
    CALIBRATION,
    TRAINING_RECORD,
    open_run,
    read_training_record,
)
from accel_gpt2.durable import write_json
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.loop import VALIDATION_SCORES, validation_scores_path
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.run_log import append_json_line


def joint_accuracy(
    index: int, directories: list[Path], data: PreparedData, recipe: TrainRecipe
) -> Callable[[int, NDArray[np.float64]], float | None]:
    """Accuracy on validation of this class's model beside the finished models of all others."""
    log_prior = log_priors(data.class_counts, recipe.priors)

    def accuracy(step: int, scores: NDArray[np.float64]) -> float | None:
        columns = [
            scores if other == index else _best_validation_scores(directory, len(data.validation))
            for other, directory in enumerate(directories)
        ]
        present = [column for column in columns if column is not None]
        if len(present) < len(columns):
            return None
        predictions = predict(np.stack(present, axis=1), log_prior)
        return float((predictions == data.validation.labels).mean())

    return accuracy


def log_joint_validation(
    run_directory: Path, directories: list[Path], data: PreparedData, recipe: TrainRecipe
) -> None:
    """Add a row for each evaluation, first to last: all classes' models of that time together.

    While classes are trained one after another, only the last one's rows can have this.
    """
    log_prior = log_priors(data.class_counts, recipe.priors)
    by_class = [
        sorted(
            (path for path in (directory / VALIDATION_SCORES).glob("*.npy") if path.stem.isdigit()),
            key=lambda path: int(path.stem),
        )
        for directory in directories
    ]
    num_documents = len(data.validation)
    for number, paths in enumerate(zip(*by_class, strict=False), start=1):
        scores = np.stack([_read_scores(path, num_documents) for path in paths], axis=1)
        accuracy = float((predict(scores, log_prior) == data.validation.labels).mean())
        row: dict[str, object] = {
            "event": "joint_validation",
            "evaluation": number,
            "steps": [int(path.stem) for path in paths],
            "accuracy": accuracy,
        }
        append_json_line(run_directory / "log.jsonl", row)


def _best_validation_scores(directory: Path, num_documents: int) -> NDArray[np.float64] | None:
    """Of a finished class; None when it is not finished."""
    final = directory / "final"
    if not (final / TRAINING_RECORD).is_file():
        return None
    best_step = read_training_record(final).best_step
    return _read_scores(validation_scores_path(directory, best_step), num_documents)


def _read_scores(path: Path, num_documents: int) -> NDArray[np.float64]:
    """What `write_array` wrote; a file of so many scores has one form, so nothing is parsed."""
    blank = io.BytesIO()
    np.save(blank, np.zeros(num_documents))
    header = blank.getvalue()[: -8 * num_documents]
    try:
        data = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    if len(data) != len(blank.getvalue()) or not data.startswith(header):
        raise UserError(
            f"{path} is not the scores of {num_documents} documents: remove {path.parent.parent} "
            "and start again to train this class anew."
        )
    return np.frombuffer(data, dtype=np.float64, offset=len(header))


def calibrate(run_directory: Path, data: PreparedData, progress: TrainProgress) -> None:
    """Fit the calibration on validation scores of the best models, and say the joint accuracy."""
    run = open_run(run_directory, finished=False)
    columns = [
        _best_validation_scores(run.class_directory(i), len(data.validation))
        for i in range(len(run.class_names))
    ]
    log_likelihoods = np.stack([column for column in columns if column is not None], axis=1)
    log_prior = log_priors(run.class_counts, run.recipe.priors)
    num_tokens = data.validation.lengths.astype(np.int64) - 1
    labels = data.validation.labels
    calibration = fit_calibration(log_likelihoods, log_prior, num_tokens, labels)
    accuracy = float((predict(log_likelihoods, log_prior) == labels).mean())
    write_json(
        run_directory / CALIBRATION,
        {
            **calibration.to_json(),
            "joint_validation_accuracy": accuracy,
            "validation_documents": len(labels),
        },
    )
    progress.say(f"Joint validation accuracy {accuracy:.4f} on {len(labels)} documents")
