"""Every alarm goes off on its defect, names its cause, and stays silent on healthy results."""

import json

import numpy as np
import pytest

from accel_gpt2.classify.alarms import Judged, count_shared_documents, find_alarms

NAMES = ("World", "Sports", "Business", "Sci/Tech")
# What GPT-2 per class gives: the own class a little better than the others.
BITS_PER_BYTE = (1.2 - 0.1 * np.eye(4)).tolist()
BITS_PER_TOKEN = (5.0 - 0.3 * np.eye(4)).tolist()
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 250))


def predictions(accuracy, labels=LABELS, seed=0):
    """Right with this probability, whatever the class, else the next class."""
    wrong = np.random.default_rng(seed).random(len(labels)) >= accuracy
    return (labels + wrong) % (labels.max() + 1)


def judged(entry_id="3", kind="generative", accuracy=0.9, **changes):
    metrics = {
        "bits_per_byte": BITS_PER_BYTE,
        "bits_per_token": BITS_PER_TOKEN,
        "calibrated": {"accuracy": accuracy},
    }
    values = {
        "id": entry_id,
        "name": "gpt2 per class",
        "kind": kind,
        "predictions": predictions(accuracy),
        "metrics": metrics | changes.pop("metrics", {}),
    }
    return Judged(**(values | changes))


def alarms(*entries, labels=LABELS, class_names=NAMES, **others):
    found = find_alarms(entries, labels=labels, class_names=class_names, **others)
    assert json.loads(json.dumps(found)) == found
    for alarm in found:
        assert set(alarm) == {"kind", "entries", "what", "cause", "next"}
        for part in ("what", "cause", "next"):
            assert alarm[part].endswith("."), alarm
    return found


def only_alarm(*entries, **others):
    (alarm,) = alarms(*entries, **others)
    return alarm


def test_healthy_results_raise_no_alarm():
    """Good arms of every kind, on a shuffled split of new documents, are left in peace."""
    posterior = {"bits_per_byte": None, "bits_per_token": None}
    entries = [
        judged("1a", "classical", 0.88, metrics=posterior),
        judged("1b", "classical", 0.86),
        judged("2", "zero_shot", 0.7),
        judged("3", "generative", 0.9),
        judged("5", "discriminative", 0.91, metrics=posterior),
        # A pseudo-log-likelihood may go below what a likelihood can.
        judged("7c", "masked", 0.89, metrics={"bits_per_byte": np.full((4, 4), 0.4).tolist()}),
        judged("8", "hybrid", 0.9),
    ]
    assert alarms(*entries) == []
    assert alarms() == []


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("generative", "learning rate"),
        ("discriminative", "learning rate"),
        ("masked", "too few steps"),
        ("hybrid", "learning rate"),
        ("zero_shot", "prompts"),
        ("classical", "too few training documents"),
    ],
)
def test_a_near_chance_arm_names_what_its_kind_suffers_from(kind, cause):
    """An arm at a quarter of four balanced classes is told what usually does that."""
    alarm = only_alarm(judged("6", kind, 0.26))
    assert alarm["kind"] == "near_chance"
    assert alarm["entries"] == ["6"]
    assert alarm["what"].startswith("6 (gpt2 per class) gets 2")
    assert "1,000 test documents" in alarm["what"]
    assert "25.0%" in alarm["what"]
    assert cause in alarm["cause"]


def test_independent_masks_are_named():
    """The estimator that fails by itself is named, and the two that do not are pointed to."""
    alarm = only_alarm(judged("7a", "masked", 0.27, independent_masks=True))
    assert "two random choices of words" in alarm["cause"]
    assert "7b" in alarm["next"]
    assert "7c" in alarm["next"]


@pytest.mark.parametrize(("accuracy", "alarmed"), [(0.84, True), (0.88, True), (0.93, False)])
def test_chance_is_the_majority_class(accuracy, alarmed):
    """Where 87% of documents are ham, 88% right is hardly more than always saying ham."""
    labels = np.random.default_rng(1).permutation([0] * 870 + [1] * 130)
    # Errors in proportion to the classes, so that recalls are equal.
    answers = np.where(np.random.default_rng(2).random(1000) < accuracy, labels, 1 - labels)
    entry = judged(predictions=answers)
    found = alarms(entry, labels=labels, class_names=("ham", "spam"))
    assert [alarm["kind"] for alarm in found] == ["near_chance"] * alarmed


@pytest.mark.parametrize(("accuracy", "alarmed"), [(0.44, True), (0.52, False)])
def test_nearer_to_chance_than_to_the_best(accuracy, alarmed):
    """Surely above chance, and still an arm in which something failed: measured by the best one."""
    masked = judged("7a", "masked", accuracy, independent_masks=True)
    found = alarms(judged("3", accuracy=0.88), masked)
    assert [alarm["entries"] for alarm in found] == [["7a"]] * alarmed
    if alarmed:
        (alarm,) = found
        assert alarm["kind"] == "near_chance"
        assert "nearer to the 25.0% of always answering the most frequent class" in alarm["what"]
        assert "asked for other words" in alarm["cause"]
    assert not alarms(masked)


def test_few_documents_cannot_rule_out_chance():
    """The same 70% is an alarm on 20 documents and none on 1,000."""
    few = np.arange(20) % 2
    many = np.random.default_rng(0).integers(0, 2, 1000)
    for labels, kinds in ((few, ["near_chance"]), (many, [])):
        answers = np.where(np.arange(len(labels)) % 10 < 7, labels, 1 - labels)
        found = alarms(judged(predictions=answers), labels=labels, class_names=("a", "b"))
        assert [alarm["kind"] for alarm in found] == kinds


def unequal(recall_of_first, **changes):
    """Class 0 is found as often as asked, the others in 90%."""
    answers = predictions(0.9)
    first = LABELS == 0
    answers[first] = np.where(np.arange(first.sum()) < recall_of_first * first.sum(), 0, 1)
    return judged(predictions=answers, **changes)


@pytest.mark.parametrize(("recall", "alarmed"), [(0.7, True), (0.8, False)])
def test_unequal_recall(recall, alarmed):
    """A class found 20 points less often than another is named, one 10 points less is not."""
    found = alarms(unequal(recall, metrics={"calibrated": {"accuracy": recall}}))
    assert [alarm["kind"] for alarm in found] == ["unequal_recall"] * alarmed
    if alarmed:
        assert "70.0% of those of World" in found[0]["what"]
        assert "Bayes' rule without calibration" in found[0]["cause"]
        assert "calibrated prediction" in found[0]["next"]
        assert "Calibration" not in found[0]["cause"]


def test_unequal_recall_that_calibration_mends():
    """Where calibrated predictions are better, the alarm says by how much."""
    alarm = only_alarm(unequal(0.6, metrics={"calibrated": {"accuracy": 0.893}}))
    assert "Calibration, which takes that out, gets 89.3% right." in alarm["cause"]


@pytest.mark.parametrize("kind", ["discriminative", "classical"])
def test_unequal_recall_without_likelihoods(kind):
    """A classifier without a likelihood per class has no model of a class that could lean."""
    alarm = only_alarm(unequal(0.6, kind=kind, metrics={"bits_per_byte": None}))
    assert "Bayes" not in alarm["cause"]
    assert "The classifier learned World less well" in alarm["cause"]
    assert "confusion matrix" in alarm["next"]


def test_recall_of_a_few_documents_is_noise():
    """A class with forty documents is not held against the others."""
    labels = np.random.default_rng(0).permutation([0] * 40 + [1] * 400 + [2] * 400)
    answers = np.where((labels == 0) & (np.arange(len(labels)) % 2 == 0), 1, labels)
    assert alarms(judged(predictions=answers), labels=labels, class_names=("a", "b", "c")) == []


def test_a_sorted_test_split():
    """Labels in blocks are named as such, and a shuffled split is not."""
    labels = np.sort(LABELS)
    alarm = only_alarm(judged(predictions=predictions(0.9, labels)), labels=labels)
    assert alarm["kind"] == "sorted_test_split"
    assert alarm["entries"] == []
    assert "changes 3 times in 1,000 test documents" in alarm["what"]
    assert "about 749 times" in alarm["what"]


def test_two_sorted_files_one_after_the_other():
    """Blocks that repeat are sorted too: a slice may still hold one class only."""
    labels = np.tile(np.repeat(np.arange(4), 125), 2)
    alarm = only_alarm(judged(predictions=predictions(0.9, labels)), labels=labels)
    assert alarm["kind"] == "sorted_test_split"


def test_few_or_rare_labels_are_not_called_sorted():
    """Eight documents may lie in order, and two of a rare class beside each other."""
    assert alarms(labels=np.repeat(np.arange(4), 2)) == []
    assert alarms(labels=np.array([0] * 900 + [1] * 4), class_names=("ham", "spam")) == []


def test_a_single_class_test_split():
    """The first rows of a sorted file: one class, on which accuracy says nothing."""
    labels = np.full(1000, 2)
    alarm = only_alarm(judged(predictions=labels), labels=labels)
    assert alarm["kind"] == "single_class_test_split"
    assert "All 1,000 test documents are Business" in alarm["what"]
    assert "at random" in alarm["next"]


@pytest.mark.parametrize(("key", "unit"), [("bits_per_byte", "byte"), ("bits_per_token", "token")])
def test_a_loss_that_text_does_not_allow(key, unit):
    """Too few bits under the model of the own class are padding, or text that was trained on."""
    matrix = np.array({"bits_per_byte": BITS_PER_BYTE, "bits_per_token": BITS_PER_TOKEN}[key])
    matrix[2, 2] = 0.31
    alarm = only_alarm(judged(metrics={key: matrix.tolist()}))
    assert alarm["kind"] == "loss_too_low"
    assert f"0.31 bits per {unit}" in alarm["what"]
    assert "Business" in alarm["what"]
    assert "Padding" in alarm["cause"]


def test_padding_counted_as_tokens_is_found_in_masked_models_too():
    """The limit per token holds for pseudo-log-likelihoods as well."""
    padded = np.full((4, 4), 0.2).tolist()
    alarm = only_alarm(judged("7c", "masked", metrics={"bits_per_token": padded}))
    assert "0.20 bits per token" in alarm["what"]


def test_another_class_s_low_loss_and_unknown_ones_are_no_alarm():
    """Only the own class's model counts, and a class without documents has null."""
    matrix = [*np.array(BITS_PER_BYTE)[:3].tolist(), [None] * 4]
    matrix[0][1] = 0.1
    assert alarms(judged(metrics={"bits_per_byte": matrix})) == []


def test_shared_documents_are_told():
    """Any test document that was trained on is named, before the entries."""
    alarm = only_alarm(judged(), num_shared_documents=12)
    assert alarm["kind"] == "shared_documents"
    assert "12 of 1,000 test documents" in alarm["what"]


def test_shared_documents_are_counted_but_for_case_and_white_space():
    """Each test document counts once for itself, however often it was trained on."""
    train = ["Straße\nzum Meer", "A  fine film.", "A fine film.", "Dull"]
    test = ["STRASSE zum meer", "a fine film. ", "A fine\tfilm.", "dull.", ""]
    assert count_shared_documents(train, test) == 3
    assert count_shared_documents([], test) == 0


@pytest.mark.parametrize(("zero_shot", "alarmed"), [(0.8, False), (0.95, True)])
def test_zero_shot_that_beats_training(zero_shot, alarmed):
    """A model that saw no label and is as good as the best that did has probably seen the test."""
    found = alarms(
        judged("2", "zero_shot", zero_shot),
        judged("3", "generative", 0.88),
        judged("5", "discriminative", 0.9),
    )
    assert [alarm["kind"] for alarm in found] == ["zero_shot_too_good"] * alarmed
    if alarmed:
        assert found[0]["entries"] == ["2", "5"]
        assert "pretraining text" in found[0]["cause"]
        assert "prompt" in found[0]["cause"]


def test_zero_shot_equal_to_the_best_is_suspicious():
    """As good as the best trained arm is already too good."""
    found = alarms(judged("2", "zero_shot", 0.9), judged("3", "generative", 0.9))
    assert [alarm["kind"] for alarm in found] == ["zero_shot_too_good"]


def test_zero_shot_beside_failed_arms_is_not_suspicious():
    """An arm near chance proves nothing about the zero-shot model, nor does having no other arm."""
    failed = alarms(judged("2", "zero_shot", 0.7), judged("3", "generative", 0.25))
    assert [alarm["kind"] for alarm in failed] == ["near_chance"]
    assert alarms(judged("2", "zero_shot", 0.95)) == []
