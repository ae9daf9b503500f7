"""Text from files, options and libraries, fit to be shown: no control characters, no floods."""

import re

_LONGEST_LINE = 1000
_MOST_LINES = 40
_GAP = " ... "

# C0 and C1 controls but the line feed; separators and directions that reorder a line; surrogates,
# which stand for bytes of a file name or argument that are not UTF-8 and cannot be encoded.
_CONTROL = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""The text with control characters written as escapes; line feeds stay.

    A class name or a path may hold what clears a terminal, moves its cursor or renames its window.

    >>> printable("caf\u00e9 \x1b[31mred\r\n")
    'café \\x1b[31mred\\r\n'
    """
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def shortened(text: str) -> str:
    """A message that quotes something endless, cut: lines in their middle, many lines near the end.

    Both ends stay, because a sentence begins with what was seen and ends with what to type.

    >>> len(shortened("x" * 10_000)), len(shortened("a line\\n" * 10_000).splitlines())
    (1000, 41)
    """
    lines = [_cut(line) for line in text.splitlines()]
    if len(lines) > _MOST_LINES:
        left_out = len(lines) - _MOST_LINES
        lines = [*lines[: _MOST_LINES - 1], f"... ({left_out:,} more lines)", lines[-1]]
    return "\n".join(lines)


def _cut(line: str) -> str:
    if len(line) <= _LONGEST_LINE:
        return line
    kept = _LONGEST_LINE - len(_GAP)
    return line[: kept - kept // 2] + _GAP + line[-(kept // 2) :]
