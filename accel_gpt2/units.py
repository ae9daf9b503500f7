"""Reading and writing quantities: bytes, durations, counts."""

import re

from accel_gpt2.errors import UsageError

GIB = 2**30
MIB = 2**20

_SECONDS_PER_UNIT = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def format_bytes(num_bytes: float) -> str:
    """Binary units, three significant digits.

    >>> format_bytes(512), format_bytes(14 * 2**30), format_bytes(1.5 * 2**20)
    ('512 B', '14.0 GiB', '1.50 MiB')
    """
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    if unit == "B":
        return f"{value:.0f} B"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def format_seconds(seconds: float) -> str:
    """The two largest units that matter.

    >>> format_seconds(4.25), format_seconds(75), format_seconds(3 * 3600 + 120)
    ('4.2 s', '1 min 15 s', '3 h 02 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def format_count(count: float) -> str:
    """Thousands and millions as one reads them.

    >>> format_count(950), format_count(124_439_808), format_count(23_652)
    ('950', '124M', '23.7k')
    """
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit:
            scaled = count / limit
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{unit}"
    return f"{count:.0f}"


def parse_seconds(text: str) -> float:
    """A duration as a person types it: `90`, `90s`, `15m`, `1h30m`, `2d`.

    Raises:
        UsageError: when the text is not a positive duration.

    >>> parse_seconds("1h30m"), parse_seconds("90"), parse_seconds("2.5m")
    (5400.0, 90.0, 150.0)
    """
    cleaned = text.strip().lower().replace(" ", "")
    if re.fullmatch(r"\d+(\.\d+)?", cleaned):
        seconds = float(cleaned)
    elif re.fullmatch(r"(\d+(\.\d+)?[smhd])+", cleaned):
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", cleaned)
        seconds = sum(float(number) * _SECONDS_PER_UNIT[unit] for number, unit in parts)
    else:
        seconds = 0.0
    if seconds <= 0:
        raise UsageError(
            f"{text!r} is not a duration: type seconds or units, as in 90s, 15m, 1h30m."
        )
    return seconds
