"""Texts to classify: typed, the lines of a file, or those of a pipe as they come."""

import io
import os
import select
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

from accel_gpt2.cli.output import say
from accel_gpt2.errors import UsageError

# Each piece has twice the texts of the one before: the first answer waits for no other text, and
# later texts are enough to find others of like length for a batch.
_MOST_TEXTS = 1024

# Lines of a pipe that come closer together than this are answered together.
_PAUSE_SECONDS = 0.05
_READ_BYTES = 1 << 20

Piece = tuple[list[str], bool]  # texts, and whether these are known to be the last ones


def text_pieces(texts: Sequence[str], file: Path | None) -> Iterator[Piece]:
    """The texts to classify: typed, or the non-empty lines of a file or of stdin.

    Raises:
        UsageError: before the first piece when there is no text, or texts and a file are both
            given; of stdin also later.
    """
    if texts and file is not None:
        raise UsageError("Texts and --file are both given; give one of them.")
    if file is not None:
        return _pieces(list(_texts(_file_lines(file), str(file))))
    if texts and list(texts) != ["-"]:
        return _pieces(list(_texts(texts, "the command line")))
    if sys.stdin.isatty() and not texts:
        raise UsageError("Give a text, --file FILE, or - to read lines from stdin.")
    return _pieces(_texts(_piped_lines(), "stdin"))


def _file_lines(file: Path) -> list[str]:
    if not os.path.isfile(file):  # a device has no end, and a pipe may wait for a writer
        there = "is not a file" if os.path.exists(file) else "does not exist"
        raise UsageError(f"{file} {there}; `... | accel-gpt2 predict RUN -` reads a pipe.")
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not UTF-8 text (byte {error.start}): convert it, for instance with `iconv`."
        ) from None


def _piped_lines() -> Iterator[str | None]:
    """The lines of stdin; None where nothing has come for a while."""
    stdin = cast(io.BufferedReader, sys.stdin.buffer)
    rest = bytearray()
    number = 0
    while True:
        if not _has_more(stdin):
            yield None
        data = stdin.read1(_READ_BYTES)
        rest += data
        if data and b"\n" not in data:
            continue
        whole, rest = (rest, bytearray()) if not data else _cut_at_last_line(rest)
        for line in whole.splitlines():
            number += 1
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError:
                raise UsageError(f"stdin is not UTF-8 text (line {number}).") from None
        if not data:
            return


def _cut_at_last_line(data: bytearray) -> tuple[bytearray, bytearray]:
    end = data.rindex(b"\n") + 1
    return data[:end], data[end:]


def _has_more(stdin: io.BufferedReader) -> bool:
    """Whether it has a byte or has ended, now or in a moment."""
    try:
        return bool(select.select([stdin], [], [], _PAUSE_SECONDS)[0])
    except OSError:  # no file of the system, which is read without waiting
        return True


def _texts(lines: Iterable[str | None], source: str) -> Iterator[str | None]:
    """The lines that are not empty; says how many are.

    Raises:
        UsageError: for a line that is not UTF-8 text, and when none is left.
    """
    num_lines = num_texts = 0
    for line in lines:
        if line is None:
            yield None
            continue
        num_lines += 1
        try:
            line.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"Text {num_lines} of {source} is not UTF-8 text.") from None
        if line.strip():
            num_texts += 1
            yield line
    if not num_texts:
        raise UsageError(f"There is no text in {source}: an empty text has no class.")
    if num_texts < num_lines:
        say(f"{num_lines - num_texts} empty lines of {source} are left out.")


def _pieces(texts: Iterable[str | None]) -> Iterator[Piece]:
    """Texts that come together, up to a size.

    >>> [(len(piece), is_last) for piece, is_last in _pieces(["text"] * 20)]
    [(1, False), (2, False), (4, False), (8, False), (5, True)]
    >>> list(_pieces([None, "one", None, "two", "three"]))
    [(['one'], False), (['two', 'three'], True)]
    """
    piece: list[str] = []
    size = 1
    for text in texts:
        if piece and (text is None or len(piece) == size):
            yield piece, False
            piece, size = [], min(2 * size, _MOST_TEXTS)
        if text is not None:
            piece.append(text)
    if piece:
        yield piece, True
