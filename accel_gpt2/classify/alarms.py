"""Results that are too bad or too good to be believed, and what usually lies behind them.

Each alarm is a dictionary with `kind`, the ids of the `entries` that it concerns (none when it
concerns the data), and three sentences: `what` was seen, the likely `cause`, and what to do `next`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from accel_gpt2.catalog.arms import Kind
from accel_gpt2.classify.bayes import FloatArray, IntArray

# Of the best entry's gain over the most frequent class. The masked language models with whose
# failure this project began had 0.29 of what GPT-2 gained on such reviews (61.7% and 90.1%).
MIN_SHARE_OF_BEST_GAIN = 1 / 3
# Unequal learning, not chance: below 50 documents a recall of 85% has a standard error above 5
# points, and the gap between two of them one above 7.
RECALL_GAP = 0.15
MIN_DOCUMENTS_FOR_RECALL = 50
# From this gain on, calibration is named as the way out of unequal recalls.
CALIBRATION_GAIN = 0.01
# GPT-2 with 1.5B parameters needs 0.93 bits per byte of enwik8 (Radford et al. 2019, table 3), and
# a trigram model 1.6 of IMDB: half of the former is no natural text that was not seen before.
MIN_BITS_PER_BYTE = 0.5
# A GPT-2 token has four to five bytes, so this is far below the limit per byte: what it finds is
# padding that is counted as tokens, under a masked model as well, which sees both sides of a word.
MIN_BITS_PER_TOKEN = 0.5
# A split in random order changes its label as often as chance says, give or take a few percent. Two
# classes change at least once, so a split with less than ten changes to expect is never alarming.
MIN_SHARE_OF_LABEL_CHANGES = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One classifier on the test split, as far as the alarms need it.

    `predictions` are class indices, [num_documents]. `metrics` is an `evaluation/metrics.json`, of
    which `bits_per_byte`, `bits_per_token` and `calibrated` are read where they are known; the
    first is known of every classifier with a likelihood per class.
    """

    id: str
    name: str
    kind: Kind
    predictions: npt.ArrayLike
    metrics: Mapping[str, Any]
    independent_masks: bool = False

    @property
    def label(self) -> str:
        return f"{self.id} ({self.name})"


def find_alarms(
    entries: Sequence[Judged],
    *,
    labels: npt.ArrayLike,
    class_names: Sequence[str],
    num_shared_documents: int = 0,
) -> list[dict[str, Any]]:
    """What the results and the test split give away, the data first, then entry by entry.

    Args:
        labels: of the test documents in the order of their file, [num_documents].
        num_shared_documents: test documents whose text is also trained on
            (see `count_shared_documents`).
    """
    targets = np.asarray(labels, dtype=np.int64)
    alarms = [
        _shared_documents(num_shared_documents, len(targets)),
        _label_order(targets, class_names),
    ]
    best = max((_accuracy(entry, targets) for entry in entries), default=0.0)
    near_chance = {entry.id: _near_chance(entry, targets, best) for entry in entries}
    for entry in entries:
        alarms += [
            near_chance[entry.id],
            _unequal_recall(entry, targets, class_names),
            _loss_too_low(entry, class_names),
        ]
    credible = [entry for entry in entries if near_chance[entry.id] is None]
    alarms += _zero_shot_too_good(credible, targets)
    return [alarm for alarm in alarms if alarm is not None]


def count_shared_documents(train_texts: Sequence[str], test_texts: Sequence[str]) -> int:
    """How many test documents occur in the training texts, whatever the case and the white space.

    >>> count_shared_documents(["A  fine film.", "Dull."], ["a fine film. ", "Fine.", "DULL."])
    2
    """
    trained = {hash(_normalised(text)) for text in train_texts}
    return sum(hash(_normalised(text)) in trained for text in test_texts)


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def _alarm(
    kind: str, entries: Sequence[Judged], *, what: str, cause: str, next: str
) -> dict[str, Any]:
    return {
        "kind": kind,
        "entries": [entry.id for entry in entries],
        "what": what,
        "cause": cause,
        "next": next,
    }


def _shared_documents(num_shared: int, num_documents: int) -> dict[str, Any] | None:
    if not num_shared:
        return None
    return _alarm(
        "shared_documents",
        (),
        what=(
            f"{num_shared:,} of {num_documents:,} test documents are also in the training split, "
            "but for case and white space."
        ),
        cause="The source repeats documents across its splits, and a model may know them by heart.",
        next="Remove them from the training split and run the comparison again.",
    )


def _label_order(targets: IntArray, class_names: Sequence[str]) -> dict[str, Any] | None:
    """A split of one class, or one whose labels change far less often than in random order."""
    counts = np.bincount(targets, minlength=len(class_names))
    if np.count_nonzero(counts) == 1:
        return _alarm(
            "single_class_test_split",
            (),
            what=f"All {len(targets):,} test documents are {class_names[int(counts.argmax())]}.",
            cause=(
                "They are probably the first rows of a file that is sorted by label, where always "
                "giving one answer is 100% right."
            ),
            next="Draw the test documents at random from the whole split.",
        )
    expected = (len(targets) - 1) * (1 - np.sum((counts / len(targets)) ** 2))
    changes = int(np.count_nonzero(np.diff(targets)))
    if changes > MIN_SHARE_OF_LABEL_CHANGES * expected:
        return None
    return _alarm(
        "sorted_test_split",
        (),
        what=(
            f"The label changes {changes:,} times in {len(targets):,} test documents, where a "
            f"random order would change it about {expected:,.0f} times."
        ),
        cause=(
            "The split is sorted by label, which is harmless as long as all of it is used, but its "
            "first thousand documents may all be of one class."
        ),
        next="Score the whole split, as was done here, or draw documents from it at random.",
    )


def _accuracy(entry: Judged, targets: IntArray) -> float:
    return float(np.mean(np.asarray(entry.predictions) == targets))


def _near_chance(entry: Judged, targets: IntArray, best_accuracy: float) -> dict[str, Any] | None:
    """Accuracy that could be the majority class's, or that is nearer to it than to the best
    entry's by far."""
    accuracy = _accuracy(entry, targets)
    majority = float(np.bincount(targets).max() / len(targets))
    if majority == 1.0:  # there is nothing above it, and another alarm says so
        return None
    right = round(accuracy * len(targets))
    low = binomtest(right, len(targets)).proportion_ci(method="wilson").low
    what = (
        f"{entry.label} gets {accuracy:.1%} of {len(targets):,} test documents right, which is not "
        f"surely more than the {majority:.1%} of always answering the most frequent class."
    )
    if low > majority:
        if accuracy - majority >= MIN_SHARE_OF_BEST_GAIN * (best_accuracy - majority):
            return None
        what = (
            f"{entry.label} gets {accuracy:.1%} of {len(targets):,} test documents right, nearer "
            f"to the {majority:.1%} of always answering the most frequent class than to the "
            f"{best_accuracy:.1%} of the best entry."
        )
    cause, next = (
        _INDEPENDENT_MASKS if entry.independent_masks else _NEAR_CHANCE_BY_KIND[entry.kind]
    )
    return _alarm("near_chance", (entry,), what=what, cause=cause, next=next)


_UNDERTRAINED = (
    "The learning rate is too high or too low, or there were too few steps for the models to learn "
    "what tells the classes apart.",
    "Look at the validation loss in log.jsonl, and train longer (--epochs) or with another "
    "--learning-rate.",
)
_INDEPENDENT_MASKS = (
    "Each class's model was asked for other words than the rest, so the difference of two scores "
    "is mostly the difference between two random choices of words.",
    "Compare the same models with masks shared across classes (7b) and with the full "
    "pseudo-log-likelihood (7c): where these do well, the estimator failed and not the models.",
)
_NEAR_CHANCE_BY_KIND: Mapping[Kind, tuple[str, str]] = {
    "generative": _UNDERTRAINED,
    "discriminative": _UNDERTRAINED,
    "masked": _UNDERTRAINED,
    "hybrid": _UNDERTRAINED,
    "zero_shot": (
        "The pretrained model does not connect the prompts with the classes.",
        "Try prompts that a text of each class would naturally follow, or a larger model.",
    ),
    "classical": (
        "There are too few training documents, or their words do not tell the classes apart.",
        "Read a few documents of each class, and check that labels and texts belong together.",
    ),
}


def _unequal_recall(
    entry: Judged, targets: IntArray, class_names: Sequence[str]
) -> dict[str, Any] | None:
    correct = np.asarray(entry.predictions) == targets
    counts = np.bincount(targets, minlength=len(class_names))
    judged = np.flatnonzero(counts >= MIN_DOCUMENTS_FOR_RECALL)
    if len(judged) < 2:
        return None
    found = np.bincount(targets, weights=correct, minlength=len(class_names))
    recalls = found[judged] / counts[judged]
    best, worst = int(recalls.argmax()), int(recalls.argmin())
    if recalls[best] - recalls[worst] <= RECALL_GAP:
        return None
    favoured, neglected = class_names[judged[best]], class_names[judged[worst]]
    if entry.metrics.get("bits_per_byte") is None:
        cause = (
            f"The classifier learned {neglected} less well, because it has fewer training "
            "documents or is easily taken for another class."
        )
        next = "Look at the confusion matrix, and balance the training documents or train longer."
    else:
        cause = (
            f"The model of {favoured} gives all text more probability than the model of "
            f"{neglected} does, so Bayes' rule without calibration leans to it."
        )
        next = (
            "Use the calibrated prediction, check the priors, and give every class equally many "
            "training steps."
        )
    accuracy = float(correct.mean())
    calibrated = (entry.metrics.get("calibrated") or {}).get("accuracy")
    if calibrated is not None and calibrated - accuracy >= CALIBRATION_GAIN:
        cause += f" Calibration, which takes that out, gets {calibrated:.1%} right."
    return _alarm(
        "unequal_recall",
        (entry,),
        what=(
            f"{entry.label} finds {recalls[best]:.1%} of the documents of {favoured} but "
            f"{recalls[worst]:.1%} of those of {neglected}."
        ),
        cause=cause,
        next=next,
    )


def _loss_too_low(entry: Judged, class_names: Sequence[str]) -> dict[str, Any] | None:
    """Test text that the model of its own class finds far too easy."""
    limits = {"bits_per_token": ("token", MIN_BITS_PER_TOKEN)}
    # A pseudo-log-likelihood sees both sides of every word and has no such limit.
    if entry.kind != "masked":
        limits["bits_per_byte"] = ("byte", MIN_BITS_PER_BYTE)
    for key, (unit, limit) in limits.items():
        if entry.metrics.get(key) is None:
            continue
        own = _diagonal(entry.metrics[key])
        low = np.flatnonzero(own < limit)  # never where a class has no documents
        if len(low):
            return _alarm(
                "loss_too_low",
                (entry,),
                what=(
                    f"{entry.label} needs {own[low[0]]:.2f} bits per {unit} for test documents of "
                    f"{class_names[low[0]]}, where text that it has not seen takes more than "
                    f"{limit:g}."
                ),
                cause=(
                    "Padding is counted as if it were text, or the test documents were trained on, "
                    "or they follow one template."
                ),
                next=(
                    "Score one test document alone, without padding, and look for it in the "
                    "training split."
                ),
            )
    return None


def _diagonal(matrix: Sequence[Sequence[float | None]]) -> FloatArray:
    """[classes]; NaN for a class without documents, which JSON has as null."""
    return np.diagonal(np.array(matrix, dtype=np.float64))


def _zero_shot_too_good(entries: Sequence[Judged], targets: IntArray) -> list[dict[str, Any]]:
    supervised = [entry for entry in entries if entry.kind != "zero_shot"]
    if not supervised:
        return []
    best = max(supervised, key=lambda entry: _accuracy(entry, targets))
    return [
        _alarm(
            "zero_shot_too_good",
            (entry, best),
            what=(
                f"{entry.label}, which was never trained on a label, gets "
                f"{_accuracy(entry, targets):.1%} right, and the best trained entry, "
                f"{best.label}, {_accuracy(best, targets):.1%}."
            ),
            cause=(
                "The benchmark is probably in the pretraining text of the model or the prompt "
                "gives the label away, unless the trained entries have learned little."
            ),
            next=(
                "Read the prompts, and try the model on documents written after it was trained, "
                "before this entry is reported as zero-shot."
            ),
        )
        for entry in entries
        if entry.kind == "zero_shot" and _accuracy(entry, targets) >= _accuracy(best, targets)
    ]
