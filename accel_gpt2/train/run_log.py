"""`log.jsonl`: one JSON object per line, and never half a line between two others."""

import json
import math
import os
import sys
from pathlib import Path
from typing import IO


def append_json_line(path: Path, row: dict[str, object], *, shared: bool = False) -> None:
    """Add one line, in a single write; a NaN becomes null, since JSON has none.

    Args:
        shared: other processes write to the file too; one of them may have been killed in the
            middle of a line.
    """
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    line = (json.dumps(clean, ensure_ascii=False) + "\n").encode("utf-8")
    with path.open("ab", buffering=0) as file:
        if shared and _locked(file):
            cut_unfinished_line(path)
        written = file.write(line)
        if written < len(line):  # a disk that is nearly full takes a part; the rest says why
            file.write(line[written:])


def cut_unfinished_line(path: Path) -> None:
    """Remove what a full disk or a crash left of a last line, so that the next one starts anew."""
    try:
        with path.open("rb+") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return
            file.seek(-1, os.SEEK_END)
            if file.read(1) == b"\n":
                return
            file.seek(0)
            content = file.read()
            end = content.rfind(b"\n") + 1
            file.truncate(end)
            os.fsync(file.fileno())
    except FileNotFoundError:
        return


def _locked(file: IO[bytes]) -> bool:
    """Lock a file until it is closed, once no other process has; False where there are no locks."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
