"""log.jsonl has whole lines only."""

import json
import multiprocessing
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


def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    """Two processes at once; and one that was killed in the middle of a line breaks no other's."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"writer": 9, "num')
    writers = [multiprocessing.get_context("fork").Process(target=_write, args=(path, x))
               for x in (0, 1)]  # fmt: skip
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for writer in (0, 1):
        assert [row["number"] for row in rows if row["writer"] == writer] == list(range(100))
    assert len(rows) == 200


def _write(path: Path, writer: int) -> None:
    for number in range(100):
        row = {"writer": writer, "number": number, "text": "x" * 5000}  # longer than a page
        append_json_line(path, row, shared=True)


def test_no_log_is_no_problem(tmp_path: Path) -> None:
    """A run that never wrote a line starts like any other."""
    cut_unfinished_line(tmp_path / "log.jsonl")
    assert not (tmp_path / "log.jsonl").exists()
