"""Reads a run directory: files that other parts wrote, some of them perhaps still being written."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.recipe.layers import read_layer
from accel_gpt2.report.form import LogRow, Metrics, Plan

Unit = Literal["token", "document"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPoint:
    """`bits` is the mean over the tokens or documents since the previous point."""

    step: int
    bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationPoint:
    step: int
    bits: float
    bits_per_byte: float | None
    best: bool  # the best one up to this step


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCurve:
    """The log of one class's model, or of one of all classes, in the order of its steps."""

    class_index: int
    class_name: str
    unit: Unit  # what `bits` are per
    training: tuple[TrainingPoint, ...]
    validation: tuple[ValidationPoint, ...]
    num_tokens: int | None  # document tokens trained on
    peak_memory_bytes: int | None

    @property
    def num_steps(self) -> int:
        return max(
            [point.step for point in self.training] + [point.step for point in self.validation]
        )

    @property
    def best(self) -> ValidationPoint | None:
        """The checkpoint that is evaluated: the last point that was flagged as the best."""
        flagged = [point for point in self.validation if point.best]
        return flagged[-1] if flagged else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """`document` is its row in the source split, from 0; `margin_nats` is log p(x|predicted) -
    log p(x|label), or of p(predicted|x) and p(label|x)."""

    document: int
    label: int
    prediction: int
    margin_nats: float
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run directory says. What is not there yet is empty or None; `notices` says what was
    left out because it could not be read."""

    directory: Path
    recipe: Mapping[str, Any]
    plan: Mapping[str, Any]
    environment: Mapping[str, Any]
    command: str | None
    curves: tuple[ClassCurve, ...]
    metrics: Mapping[str, Any] | None
    mistakes: tuple[Mistake, ...]
    notices: tuple[str, ...]

    @property
    def objective(self) -> str:
        """As in the recipe; runs from before there was a choice are generative."""
        metrics = self.metrics or {}
        return str(metrics.get("objective") or self.recipe.get("objective") or "generative")


def read_run(run_directory: Path) -> Run:
    """Read everything that a report shows.

    Raises:
        UserError: when the directory is not that of a run, or its metrics.json is damaged.
    """
    if not run_directory.is_dir():
        raise UserError(f"{run_directory} is not a directory: give the --output-dir of a training.")
    if not any((run_directory / name).is_file() for name in ("recipe.yaml", "log.jsonl")):
        raise UserError(
            f"{run_directory} is not a run directory, it holds neither recipe.yaml nor log.jsonl: "
            "give the --output-dir of a training."
        )
    notices: list[str] = []
    plan = _read_optional_mapping(run_directory / "plan.json", notices)
    if not _has_form(_PLAN, plan):
        notices.append(_left_out("plan.json"))
        plan = {}
    recipe = _read_recipe(run_directory / "recipe.yaml", notices)
    unit: Unit = "document" if recipe.get("objective") == "classification" else "token"
    curves = _read_curves(run_directory / "log.jsonl", unit, notices)
    metrics = _read_metrics(run_directory)
    scores_path = run_directory / "evaluation" / "scores.parquet"
    command_path = run_directory / "command.txt"
    return Run(
        directory=run_directory,
        recipe=recipe,
        plan=plan,
        environment=_read_optional_mapping(run_directory / "environment.json", notices),
        command=command_path.read_text("utf-8", errors="replace").strip()
        if command_path.is_file()
        else None,
        curves=curves,
        metrics=metrics,
        # Without metrics the scores of some classes may still be missing.
        mistakes=()
        if metrics is None
        else _read_mistakes(scores_path, len(metrics["class_names"]), notices),
        notices=tuple(notices),
    )


_PLAN = TypeAdapter(Plan)
_METRICS = TypeAdapter(Metrics)
_LOG_ROW = TypeAdapter(LogRow)


def _has_form(form: TypeAdapter[Any], content: object) -> bool:
    try:
        form.validate_python(content)
    except ValidationError:
        return False
    return True


def _left_out(name: str) -> str:
    return f"{name} could not be read and is left out."


def _read_recipe(path: Path, notices: list[str]) -> Mapping[str, Any]:
    """It only informs here: damage is a notice, not the end of the report."""
    if not path.is_file():
        return {}
    try:
        return read_layer(path).values
    except UsageError:
        notices.append(_left_out(path.name))
        return {}


def _read_optional_mapping(path: Path, notices: list[str]) -> Mapping[str, Any]:
    """A JSON object that only informs."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        notices.append(_left_out(path.name))
        return {}
    return content


def _read_metrics(run_directory: Path) -> Mapping[str, Any] | None:
    path = run_directory / "evaluation" / "metrics.json"
    if not path.is_file():
        return None
    try:
        metrics = json.loads(path.read_text("utf-8"))
        complete = _has_form(_METRICS, metrics) and _is_square(metrics)
    except (OSError, ValueError, RecursionError):
        complete = False
    if not complete:
        raise UserError(
            f"{path} is damaged or incomplete: write it again with "
            f"`accel-gpt2 evaluate {run_directory}`."
        )
    return dict(metrics)


def _is_square(metrics: Mapping[str, Any]) -> bool:
    """Whether the matrices have a row and a column for each class."""
    size = len(metrics["class_names"])
    matrices = (metrics["confusion_matrix"], metrics.get("bits_per_byte") or [])
    return len(matrices[0]) == size and all(
        len(matrix) in {0, size} and all(len(row) == size for row in matrix) for matrix in matrices
    )


def _read_curves(path: Path, unit: Unit, notices: list[str]) -> tuple[ClassCurve, ...]:
    """Rows of log.jsonl by class; `unit` is that of losses before the first validation.

    A resumed run repeats rows: the last of each step wins.
    """
    if not path.is_file():
        return ()
    lines = path.read_text("utf-8", errors="replace").splitlines()
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    num_unreadable = 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            # The last line may be half-written: the run may be going on at this moment.
            num_unreadable += bool(line.strip()) and number < len(lines)
            continue
        if isinstance(row, dict) and row.get("event") in ("step", "evaluate"):
            index, step = row.get("class_index"), row.get("step")
            if isinstance(index, int) and isinstance(step, int):
                if _has_form(_LOG_ROW, row):
                    rows[row["event"], index, step] = row
                else:
                    num_unreadable += 1
    if num_unreadable:
        notices.append(
            f"{num_unreadable} of {len(lines)} lines of log.jsonl could not be read and are left "
            "out; a machine that stopped while it wrote leaves such a line."
        )
    ordered = [rows[key] for key in sorted(rows, key=lambda key: key[1:])]
    class_indices = sorted({row["class_index"] for row in ordered})
    curves = (
        _class_curve(index, unit, [row for row in ordered if row["class_index"] == index])
        for index in class_indices
    )
    return tuple(curve for curve in curves if curve)


def _class_curve(
    class_index: int, unit: Unit, rows: Sequence[Mapping[str, Any]]
) -> ClassCurve | None:
    """None when no validation point says what the losses are per."""
    steps = [row for row in rows if row["event"] == "step"]
    evaluations = [row for row in rows if row["event"] == "evaluate"]
    units: list[Unit] = [
        unit
        for unit in get_args(Unit)
        if any(f"validation_bits_per_{unit}" in row for row in evaluations)
    ]
    if evaluations and not units:
        return None
    unit = units[0] if units else unit
    peaks = [int(row["peak_memory_bytes"]) for row in steps if row.get("peak_memory_bytes")]
    return ClassCurve(
        class_index=class_index,
        class_name=str(rows[-1].get("class_name", f"class {class_index}")),
        unit=unit,
        training=tuple(
            TrainingPoint(step=int(row["step"]), bits=_number(row.get("loss")) / math.log(2))
            for row in steps
        ),
        validation=tuple(
            ValidationPoint(
                step=int(row["step"]),
                bits=_number(row.get(f"validation_bits_per_{unit}")),
                bits_per_byte=row.get("validation_bits_per_byte"),
                best=bool(row.get("best")),
            )
            for row in evaluations
        ),
        num_tokens=max((int(row["tokens"]) for row in steps if row.get("tokens")), default=None),
        peak_memory_bytes=max(peaks, default=None),
    )


def _number(value: object) -> float:
    """A missing or null value is a gap in the curve."""
    return float(value) if isinstance(value, int | float) else math.nan


def _read_mistakes(
    path: Path, num_classes: int, notices: list[str], *, most: int = 10
) -> tuple[Mistake, ...]:
    """The wrong predictions that the models were surest of, surest first."""
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        return ()
    integers = ("document", "label", "prediction", "num_tokens")
    try:
        table = pyarrow.parquet.read_table(path)
        # A classification head's are of classes given documents; a margin is the same of both.
        kind = "log_probability" if "log_probability_0" in table.column_names else "log_likelihood"
        scored = [f"{kind}_{index}" for index in range(num_classes)]
        form = pyarrow.schema(
            [pyarrow.field(name, pyarrow.int64(), nullable=False) for name in integers]
            + [pyarrow.field(name, pyarrow.float64(), nullable=False) for name in scored]
        )
        table = table.select(form.names).cast(form)
        table.validate(full=True)
    except (pyarrow.ArrowException, OSError, KeyError, ValueError):
        notices.append(_left_out("evaluation/scores.parquet"))
        return ()
    document, label, prediction, num_tokens = (table.column(n).to_numpy() for n in integers)
    scores: npt.NDArray[np.float64] = np.column_stack(
        [table.column(name).to_numpy() for name in scored]
    )
    if any(((x < 0) | (x >= num_classes)).any() for x in (label, prediction)):
        notices.append(_left_out("evaluation/scores.parquet"))
        return ()
    rows = np.arange(len(label))
    margin = scores[rows, prediction] - scores[rows, label]
    wrong = np.flatnonzero(prediction != label)
    surest = wrong[np.argsort(-margin[wrong], kind="stable")][:most]
    return tuple(
        Mistake(
            document=int(document[row]),
            label=int(label[row]),
            prediction=int(prediction[row]),
            margin_nats=float(margin[row]),
            num_tokens=int(num_tokens[row]),
        )
        for row in surest
    )
