"""Texts to classify: typed, from a file, from stdin; and what is no text."""

import io
from pathlib import Path

import pytest

from accel_gpt2.classify.predict import Prediction
from accel_gpt2.cli.predict import read_texts, show_predictions
from accel_gpt2.errors import UsageError


def test_typed_texts_are_taken_as_they_are() -> None:
    """A typed text may hold lines of its own."""
    assert read_texts(["one", "two\nlines"], None) == ["one", "two\nlines"]


def test_a_file_has_one_text_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Empty lines are left out, and that is said."""
    path = tmp_path / "texts.txt"
    path.write_text("größer\n\nsecond\n", encoding="utf-8")
    assert read_texts([], path) == ["größer", "second"]
    assert "1 empty lines" in capsys.readouterr().err


@pytest.mark.parametrize("typed", [[], ["-"]])
def test_stdin_is_read_when_it_is_piped(monkeypatch: pytest.MonkeyPatch, typed: list[str]) -> None:
    """Nothing or a dash reads lines from stdin."""
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert read_texts(typed, None) == ["one", "two"]


@pytest.mark.parametrize(
    ("texts", "content", "match"),
    [
        (["a"], b"b\n", "Texts and --file are both given"),
        ([], b"\n \n", r"no text in .*texts\.txt"),
        ([], b"caf\xe9\n", r"texts\.txt is not UTF-8 text \(byte 3\)"),
        ([], None, r"texts\.txt does not exist"),
    ],
)
def test_what_is_no_text_is_a_sentence(
    tmp_path: Path, texts: list[str], content: bytes | None, match: str
) -> None:
    """Each way of giving no text ends in a usage error."""
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=match):
        read_texts(texts, path)


def test_an_empty_text_has_no_class() -> None:
    """An empty argument is an error and not a prior's guess."""
    with pytest.raises(UsageError, match="no text in the command line"):
        read_texts([" "], None)


def test_the_answer_is_bayes_rule_also_where_calibration_leans_elsewhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The table marks the answer; where the calibrated probabilities differ, a sentence says so."""
    prediction = Prediction(
        label="b",
        probabilities={"a": 0.6, "b": 0.4},
        raw_probabilities={"a": 0.1, "b": 0.9},
        log_likelihoods={"a": -5.0, "b": -4.0},
        num_tokens=3,
        truncated=False,
    )
    show_predictions(["text"], [prediction])
    shown = capsys.readouterr()
    (marked,) = [line for line in shown.out.splitlines() if "Bayes' rule" in line]
    assert marked.startswith("b ")
    assert "Bayes' rule answers b" in shown.err
    assert "leans to a" in shown.err
