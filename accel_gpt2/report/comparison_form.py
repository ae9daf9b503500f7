"""The form of comparison.json: only what is shown, everything else may be anything.

What is unknown is null or absent. Anything else of another form was damaged.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Required

from annotated_types import Ge, MinLen
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from accel_gpt2.errors import UserError
from accel_gpt2.report.form import ByClass, Count, Interval, Probabilities, Share, Training

_FORM = ConfigDict(strict=True, allow_inf_nan=False)

Kind = Literal["generative", "discriminative", "masked", "hybrid", "zero_shot", "classical"]


@with_config(_FORM)
class EntryMetrics(TypedDict, total=False):
    """The metrics.json of an entry's first seed."""

    accuracy: Required[float]
    accuracy_interval_95: Interval
    macro_f1: Share
    macro_f1_interval_95: Interval
    recall: ByClass | None
    raw: Probabilities | None
    calibrated: Probabilities | None
    bits_per_byte: list[list[float | None]] | None  # [true class][model's class]
    documents_per_second: float | None
    training: Training | None
    majority_class_accuracy: float | None


@with_config(_FORM)
class BySeed(TypedDict, total=False):
    """The spread over seeds."""

    seeds: list[int]
    accuracy: list[float | None]
    accuracy_mean: float | None
    accuracy_standard_deviation: float | None
    accuracy_standard_error_of_test: float | None


@with_config(_FORM)
class TrainedOnPoint(TypedDict):
    """Accuracy, one for each seed, after training on so many documents of each class."""

    documents_per_class: Annotated[float, Ge(1)]
    accuracy: list[float | None]


@with_config(_FORM)
class TokensReadPoint(TypedDict, total=False):
    """Accuracy when only a document's first tokens are read."""

    tokens: Required[Annotated[float, Ge(1)]]
    accuracy: Required[float]
    interval_95: Interval


@with_config(_FORM)
class RiskPoint(TypedDict):
    """Share of wrong answers among the share of documents that the classifier is surest of."""

    coverage: float
    risk: float


@with_config(_FORM)
class Curves(TypedDict, total=False):
    """Points in any order."""

    training_documents: list[TrainedOnPoint] | None
    tokens_read: list[TokensReadPoint] | None
    risk_coverage: list[RiskPoint] | None


@with_config(_FORM)
class LogRatios(TypedDict):
    """Histograms, by class name, of log p(x|true class) - the best other one, nats."""

    edges: Annotated[list[float], MinLen(2)]
    counts: dict[str, list[Count]]


@with_config(_FORM)
class OutOfDistribution(TypedDict, total=False):
    """AUROC of three scores that should be higher on the test documents than on `dataset`'s."""

    dataset: str | None
    num_documents: Count | None
    auroc: Share
    auroc_per_token: Share
    auroc_max_probability: Share


@with_config(_FORM)
class Entry(TypedDict, total=False):
    """One classifier of the comparison, done or missing."""

    id: Required[str]
    arm: Required[Annotated[int, Ge(1)]]
    name: Required[str]
    kind: Required[Kind]
    status: Required[Literal["done", "missing"]]
    description: str | None
    why_missing: str | None
    directories: list[str] | None
    recipe: dict[str, Any] | None
    metrics: EntryMetrics | None
    by_seed: BySeed | None
    curves: Curves | None
    log_ratios: LogRatios | None
    out_of_distribution: OutOfDistribution | None


@with_config(_FORM)
class Pair(TypedDict, total=False):
    """Two entries on the same documents; the difference is accuracy(a) - accuracy(b)."""

    a: Required[str]
    b: Required[str]
    accuracy_difference: Required[float]
    interval_95: Interval
    only_a: Count | None  # documents that only a gets right
    only_b: Count | None
    p_value: float | None  # McNemar's exact test
    p_value_holm: float | None
    significant: bool | None


@with_config(_FORM)
class Alarm(TypedDict, total=False):
    """Something that looks wrong, in three sentences."""

    kind: Required[str]
    what: Required[str]
    entries: list[str] | None
    cause: str | None
    next: str | None


@with_config(_FORM)
class ClassCounts(TypedDict, total=False):
    """Documents of each class, in the order of the class names."""

    train: list[Count] | None
    validation: list[Count] | None
    test: list[Count] | None


@with_config(_FORM)
class Comparison(TypedDict, total=False):
    """comparison.json."""

    format_version: Required[Literal[1]]
    dataset: Required[str]
    class_names: Required[Annotated[list[str], MinLen(1)]]
    entries: Required[list[Entry]]
    split: str | None
    num_documents: Count | None
    class_counts: ClassCounts | None
    max_length: Count | None
    truncated_documents: Count | None
    seeds: list[int] | None
    command: str | None
    date: str | None
    environment: dict[str, Any] | None
    data_treatments: list[dict[str, str | int]] | None
    verdict: list[str] | None
    pairs: list[Pair] | None
    alarms: list[Alarm] | None


_COMPARISON = TypeAdapter(Comparison)


def read_comparison(directory: Path) -> Comparison:
    """The comparison of a directory.

    Raises:
        UserError: when there is none, or it is damaged.
    """
    path = directory / "comparison.json"
    if not path.is_file():
        raise UserError(
            f"{directory} holds no comparison.json: give the --output-dir of an "
            "`accel-gpt2 compare`, or run that first."
        )
    try:
        comparison = _COMPARISON.validate_json(path.read_bytes())
        problem = next(_contradictions(comparison), None)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
    if problem:
        raise UserError(
            f"{path} is damaged ({problem}): type its `accel-gpt2 compare` command again, which "
            "writes it anew and runs no arm again that is done."
        )
    return comparison


def _contradictions(comparison: Comparison) -> Iterator[str]:
    """What has the right form and cannot be shown."""
    num_classes = len(comparison["class_names"])
    for split, counts in (comparison.get("class_counts") or {}).items():
        if isinstance(counts, list) and len(counts) != num_classes:
            yield f"class_counts.{split} has {len(counts)} of {num_classes} classes"
    ids = [entry["id"] for entry in comparison["entries"]]
    if len(set(ids)) < len(ids):
        yield "two entries have one id"
    for entry in comparison["entries"]:
        matrix = metrics_of(entry).get("bits_per_byte")
        if matrix and {len(matrix), *map(len, matrix)} != {num_classes}:
            yield f"the bits_per_byte of entry {entry['id']} have no row and column for each class"
        ratios = entry.get("log_ratios")
        if ratios and any(len(x) != len(ratios["edges"]) - 1 for x in ratios["counts"].values()):
            yield f"the log_ratios of entry {entry['id']} have no count for each bin"


def entries_done(comparison: Comparison) -> list[Entry]:
    """The entries that have an evaluation to show."""
    return [
        entry for entry in comparison["entries"] if entry["status"] == "done" and metrics_of(entry)
    ]


def metrics_of(entry: Entry) -> Mapping[str, Any]:
    """An entry's metrics; empty when there are none."""
    return entry.get("metrics") or {}
