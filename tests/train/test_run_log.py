"""log.jsonl has whole lines only."""

import json
from pathlib import Path

import pytest

from accel_gpt2.train.run_log import append_json_line, cut_unfinished_line


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    """JSON knows no NaN, and readers of it would fail on one."""
    append_json_line(tmp_path / "log.jsonl", {"loss": float("nan"), "mfu": 0.5, "name": "naïve"})
    text = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"loss": None, "mfu": 0.5, "name": "naïve"}


@pytest.mark.parametrize("rest", ["", '{"event": "st', "\xe4"], ids=["whole", "cut", "cut-letter"])
def test_a_cut_last_line_goes(tmp_path: Path, rest: str) -> None:
    """What a crash left of a line is removed, so that the next one is not glued to it."""
    path = tmp_path / "log.jsonl"
    append_json_line(path, {"step": 1})
    with path.open("ab") as file:
        file.write(rest.encode()[:-1] if rest == "\xe4" else rest.encode())
    cut_unfinished_line(path)
    append_json_line(path, {"step": 2})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_no_log_is_no_problem(tmp_path: Path) -> None:
    """A run that never wrote a line starts like any other."""
    cut_unfinished_line(tmp_path / "log.jsonl")
    assert not (tmp_path / "log.jsonl").exists()
