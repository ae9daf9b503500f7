"""The form of the files that a report reads: only what is shown, everything else may be anything.

A file of another form was damaged or is from another program; what it lacks is left out.
"""

from typing import Annotated, Literal, Required

from annotated_types import Ge, Len, MinLen
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

_FORM = ConfigDict(strict=True)

Count = Annotated[int, Ge(0)]
Share = float | None
Interval = Annotated[list[float], Len(2, 2)] | None
ByClass = dict[str, Share]


@with_config(_FORM)
class Plan(TypedDict, total=False):
    """plan.json."""

    class_names: list[str]
    num_parameters: Count
    data_treatments: list[dict[str, str | int]]


@with_config(_FORM)
class LogRow(TypedDict, total=False):
    """A row of log.jsonl about a step or an evaluation."""

    event: Required[Literal["step", "evaluate"]]
    class_index: Required[Count]
    step: Required[Count]
    class_name: str
    loss: float | None
    tokens: Count | None
    peak_memory_bytes: Count | None
    validation_bits_per_token: float | None
    validation_bits_per_document: float | None
    validation_bits_per_byte: float | None
    best: bool | None


@with_config(_FORM)
class Bin(TypedDict):
    """One bar of the reliability diagram."""

    lower: float
    upper: float
    count: Count
    mean_confidence: float | None
    accuracy: float | None


@with_config(_FORM)
class Probabilities(TypedDict, total=False):
    """What depends on the probabilities."""

    auroc: Share
    nll: Share
    brier: Share
    ece: Share
    reliability: list[Bin]


@with_config(_FORM)
class McNemar(TypedDict, total=False):
    """The exact test between the classifier and the baseline."""

    p_value: float | None
    only_a: Count
    only_b: Count


@with_config(_FORM)
class Baseline(TypedDict, total=False):
    """The discriminative model beside the classifier."""

    name: str | None
    description: str | None
    accuracy: float
    accuracy_interval_95: Interval
    accuracy_difference_interval_95: Interval
    macro_f1: Share
    macro_f1_interval_95: Interval
    auroc: Share
    nll: Share
    brier: Share
    ece: Share
    seconds: float | None
    mcnemar: McNemar | None


@with_config(_FORM)
class Training(TypedDict, total=False):
    """What the training took."""

    seconds: float | None
    document_tokens: Count | None
    tokens_per_second: float | None
    peak_memory_bytes: Count | None
    cost_usd: float | None


@with_config(_FORM)
class Scale(TypedDict, total=False):
    """The calibration's inverse temperature."""

    scale: float | None


@with_config(_FORM)
class Metrics(TypedDict, total=False):
    """evaluation/metrics.json."""

    accuracy: Required[float]
    class_names: Required[Annotated[list[str], MinLen(1)]]
    confusion_matrix: Required[list[list[Count]]]
    model: str | None
    objective: str | None
    dataset: str | None
    split: str | None
    num_documents: Count | None
    accuracy_interval_95: Interval
    macro_f1: Share
    macro_f1_interval_95: Interval
    precision: ByClass | None
    recall: ByClass | None
    f1: ByClass | None
    raw: Probabilities | None
    calibrated: Probabilities | None
    bits_per_byte: list[list[float | None]] | None
    documents_per_second: float | None
    truncated_documents: Count | None
    majority_class_accuracy: float | None
    baseline: Baseline | None
    training: Training | None
    calibration: Scale | None
    data_treatments: list[dict[str, str | int]] | None
