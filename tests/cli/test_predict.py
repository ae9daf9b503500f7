"""Texts to classify: typed, from a file, from stdin; and what is no text."""

import io
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from accel_gpt2.classify.predict import Prediction
from accel_gpt2.cli.predict import show_answers, show_prediction
from accel_gpt2.cli.texts import text_pieces
from accel_gpt2.errors import UsageError


def _read(texts: Sequence[str], file: Path | None) -> list[str]:
    return [text for piece, _ in text_pieces(texts, file) for text in piece]


def test_typed_texts_are_taken_as_they_are() -> None:
    """A typed text may hold lines of its own."""
    assert _read(["one", "two\nlines"], None) == ["one", "two\nlines"]


def test_a_file_has_one_text_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Empty lines are left out, and that is said."""
    path = tmp_path / "texts.txt"
    path.write_text("größer\n\nsecond\n", encoding="utf-8")
    assert _read([], path) == ["größer", "second"]
    assert "1 empty lines" in capsys.readouterr().err


@pytest.mark.parametrize("typed", [[], ["-"]])
def test_stdin_is_read_when_it_is_piped(monkeypatch: pytest.MonkeyPatch, typed: list[str]) -> None:
    """Nothing or a dash reads lines from stdin."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("größer\n\ntwo".encode())))
    assert _read(typed, None) == ["größer", "two"]


def test_lines_of_a_pipe_are_answered_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that has come is handed on before the next one is written, cut where it may be."""
    reading, writing = os.pipe()
    asked = threading.Event()

    def write() -> None:
        with open(writing, "wb", buffering=0) as pipe:
            pipe.write("gr\u00f6\u00dfer\n".encode())
            if asked.wait(10):
                pipe.write(b"half a li")
                pipe.write(b"ne\nlast, unended")

    writer = threading.Thread(target=write)
    with open(reading, encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        writer.start()
        pieces = text_pieces([], None)
        assert next(pieces) == (["gr\u00f6\u00dfer"], False)
        asked.set()
        assert list(pieces) == [(["half a line", "last, unended"], True)]
        writer.join()


def test_a_line_of_a_pipe_that_is_no_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the line, for whoever has to find it."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ncaf\xe9\n")))
    with pytest.raises(UsageError, match=r"stdin is not UTF-8 text \(line 2\)"):
        _read([], None)


def test_the_first_answer_waits_for_no_other_text() -> None:
    """Pieces grow from one text to a thousand, so that later texts find others of their length."""
    sizes = [len(piece) for piece, _ in text_pieces(["text"] * 5000, None)]
    assert sizes == [*(2**power for power in range(11)), 1024, 1024, 905]


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
        _read(texts, path)


def test_an_empty_text_has_no_class() -> None:
    """An empty argument is an error and not a prior's guess."""
    with pytest.raises(UsageError, match="no text in the command line"):
        _read([" "], None)


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
    show_prediction(prediction)
    shown = capsys.readouterr()
    (marked,) = [line for line in shown.out.splitlines() if "Bayes' rule" in line]
    assert marked.startswith("b ")
    assert "Bayes' rule answers b" in shown.err
    assert "leans to a" in shown.err


def test_answers_of_several_pieces_make_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    """One heading, and columns that keep their places."""
    predictions = [
        Prediction(
            label=label,
            probabilities={"a": 0.25, "a longer name": 0.75},
            raw_probabilities={},
            log_likelihoods=None,
            num_tokens=3,
            truncated=False,
        )
        for label in ("a", "a longer name")
    ]
    show_answers(["one", "two\x1b[2J"], predictions, heading=True)
    show_answers(["three"], predictions[:1], heading=False)
    heading, rule, *rows = capsys.readouterr().out.splitlines()
    assert heading == "class           probability   text"
    assert set(rule) == {"\u2500"}
    assert rows == [
        "a                     0.250   one",
        "a longer name         0.750   two\\x1b[2J",
        "a                     0.250   three",
    ]
