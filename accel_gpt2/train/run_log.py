"""`log.jsonl`: one JSON object per line, and never half a line between two others."""

import json
import math
import os
from pathlib import Path


def append_json_line(path: Path, row: dict[str, object]) -> None:
    """Add one line, in a single write; a NaN becomes null, since JSON has none."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    line = (json.dumps(clean, ensure_ascii=False) + "\n").encode("utf-8")
    with path.open("ab", buffering=0) as file:
        written = file.write(line)
        if written < len(line):  # a disk that is nearly full takes a part; the rest says why
            file.write(line[written:])


def cut_unfinished_line(path: Path) -> None:
    """Remove what a full disk or a crash left of a last line, so that the next one starts anew."""
    try:
        with path.open("rb+") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                file.truncate(end)
                os.fsync(file.fileno())
    except FileNotFoundError:
        return
