"""What the models say together about the validation documents."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from accel_gpt2.classify.bayes import FloatArray, IntArray, predict
from accel_gpt2.classify.calibration import fit_calibration
from accel_gpt2.classify.parts import ALL_CLASSES, Part
from accel_gpt2.classify.prepare import PreparedData
from accel_gpt2.classify.run import (
    CALIBRATION,
    TRAINING_RECORD,
    open_run,
    read_training_record,
    score_log_prior,
)
from accel_gpt2.durable import write_json
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.loop import VALIDATION_SCORES, validation_scores_path
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.run_log import append_json_line


def joint_accuracy(
    part: Part, parts: Sequence[Part], data: PreparedData, recipe: TrainRecipe
) -> Callable[[int, NDArray[np.float64]], float | None]:
    """Accuracy on validation of this part's model beside the finished models of all others."""
    log_prior = score_log_prior(recipe, data.class_counts)

    def accuracy(step: int, scores: NDArray[np.float64]) -> float | None:
        if recipe.objective == "unconditional":
            return None
        matrices = [
            scores if other == part else _best_validation_scores(other, data) for other in parts
        ]
        present = [matrix for matrix in matrices if matrix is not None]
        if len(present) < len(matrices):
            return None
        return _accuracy(np.column_stack(present), log_prior, data)

    return accuracy


def _accuracy(scores: FloatArray, log_prior: FloatArray, data: PreparedData) -> float:
    return float((predict(scores, log_prior) == data.validation.labels).mean())


def log_joint_validation(
    run_directory: Path, parts: Sequence[Part], data: PreparedData, recipe: TrainRecipe
) -> None:
    """Add a row for each evaluation, first to last: all classes' models of that time together.

    While classes are trained one after another, only the last one's rows can have this.
    """
    log_prior = score_log_prior(recipe, data.class_counts)
    by_part = [
        sorted(
            (
                path
                for path in (part.directory / VALIDATION_SCORES).glob("*.npy")
                if path.stem.isdigit()
            ),
            key=lambda path: int(path.stem),
        )
        for part in parts
    ]
    for number, paths in enumerate(zip(*by_part, strict=False), start=1):
        scores = np.column_stack(
            [
                _read_scores(path, _shape(part, data))
                for part, path in zip(parts, paths, strict=True)
            ]
        )
        row: dict[str, object] = {
            "event": "joint_validation",
            "evaluation": number,
            "steps": [int(path.stem) for path in paths],
            "accuracy": _accuracy(scores, log_prior, data),
        }
        append_json_line(run_directory / "log.jsonl", row)


def _best_validation_scores(part: Part, data: PreparedData) -> NDArray[np.float64] | None:
    """Of a finished part; None when it is not finished."""
    final = part.finals[0]
    if not (final / TRAINING_RECORD).is_file():
        return None
    best_step = read_training_record(final).best_step
    return _read_scores(validation_scores_path(part.directory, best_step), _shape(part, data))


def _shape(part: Part, data: PreparedData) -> tuple[int, ...]:
    num_documents = len(data.validation)
    if part.name == ALL_CLASSES:
        return (num_documents, len(data.text.class_names))
    return (num_documents,)


def _read_scores(path: Path, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """What `write_array` wrote; a file of such scores has one form, so nothing is parsed."""
    blank = io.BytesIO()
    np.save(blank, np.zeros(shape))
    header = blank.getvalue()[: -8 * int(np.prod(shape))]
    try:
        data = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    if len(data) != len(blank.getvalue()) or not data.startswith(header):
        raise UserError(
            f"{path} is not the scores of {shape[0]} documents: remove {path.parent.parent} "
            "and start again to train this class anew."
        )
    return np.frombuffer(data, dtype=np.float64, offset=len(header)).reshape(shape)


def calibrate(run_directory: Path, data: PreparedData, progress: TrainProgress) -> None:
    """Fit the calibration on validation scores of the best models, and say the joint accuracy."""
    run = open_run(run_directory, finished=False)
    found = [_best_validation_scores(part, data) for part in run.parts]
    scores = np.column_stack([matrix for matrix in found if matrix is not None])
    num_tokens = data.validation.lengths.astype(np.int64) - 1
    labels = data.validation.labels
    write_calibration(run_directory / CALIBRATION, scores, run.log_prior, num_tokens, labels)
    accuracy = _accuracy(scores, run.log_prior, data)
    progress.say(f"Joint validation accuracy {accuracy:.4f} on {len(labels)} documents")


def write_calibration(
    path: Path, scores: FloatArray, log_prior: FloatArray, num_tokens: IntArray, labels: IntArray
) -> None:
    """Fit a calibration on validation scores, [num_documents, num_classes], and keep it."""
    write_json(
        path,
        {
            **fit_calibration(scores, log_prior, num_tokens, labels).to_json(),
            "joint_validation_accuracy": float((predict(scores, log_prior) == labels).mean()),
            "validation_documents": len(labels),
        },
    )
