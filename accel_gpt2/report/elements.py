"""What pages are made of: figures, tables, numbers as text, and the templates that show them."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from accel_gpt2.report import drawing

UNKNOWN = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureOnPage:
    """A figure in both themes; the light one is also a file beside the page."""

    file_name: str
    title: str
    caption: str
    description: str  # for those who cannot see it
    light_png: bytes
    dark_png: bytes

    @property
    def width_pixels(self) -> int:
        """CSS pixels at full size; the width stands in bytes 16 to 20 of every PNG."""
        width = int.from_bytes(self.light_png[16:20], "big")
        return round(width / drawing.PNG_PIXELS_PER_CSS_PIXEL)

    @property
    def light_uri(self) -> str:
        return _data_uri(self.light_png)

    @property
    def dark_uri(self) -> str:
        return _data_uri(self.dark_png)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The first `num_text_columns` columns hold text; the others hold numbers, set to the right.

    `strong` are the (row, column) pairs of cells to be set in bold. A folded table is opened by
    its title; a compact one has many columns of small print.
    """

    title: str
    introduction: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text_columns: int = 1
    strong: frozenset[tuple[int, int]] = frozenset()
    folded: bool = False
    compact: bool = False


def draw_figure(
    draw: Callable[[drawing.Theme], bytes],
    *,
    file_name: str,
    title: str,
    caption: str,
    description: str,
) -> FigureOnPage:
    """The figure that `draw` makes, in both themes."""
    return FigureOnPage(
        file_name=file_name,
        title=title,
        caption=caption,
        description=description,
        light_png=draw(drawing.LIGHT),
        dark_png=draw(drawing.DARK),
    )


def render(template: str, **content: Any) -> str:
    """A template of this package as HTML text; all text in the content is escaped."""
    environment = Environment(
        loader=PackageLoader("accel_gpt2.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


def treatments_table(treatments: Sequence[Mapping[str, str | int]]) -> Table | None:
    """What happened to documents before anything was trained; None when nothing did."""
    if not treatments:
        return None
    return Table(
        title="What was done to the data",
        introduction="Documents that were not used just as they were found.",
        header=("What", "Split", "Documents", "For example"),
        rows=tuple(
            (
                str(row.get("what") or row.get("kind") or UNKNOWN),
                str(row.get("split") or UNKNOWN),
                f"{row['count']:,}" if isinstance(row.get("count"), int) else UNKNOWN,
                str(row.get("example") or UNKNOWN),
            )
            for row in treatments
        ),
        num_text_columns=4,
    )


def plain_items(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys and values for a list."""
    return [(str(key), plain_value(value)) for key, value in values.items()]


def plain_value(value: object) -> str:
    """A recipe's value as text; an empty sequence and None read as such.

    >>> plain_value([1, 2]), plain_value(()), plain_value(None), plain_value(0.5)
    ('1, 2', '(none)', '(none)', '0.5')
    """
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "(none)"
    return "(none)" if value is None or value == "" else str(value)


# Numbers as text.


def percent(share: float) -> str:
    """A share in percent.

    >>> percent(0.8714)
    '87.1%'
    """
    return f"{share:.1%}"


def percent_interval(bounds: Sequence[float]) -> str:
    """A share's bounds in percent.

    >>> percent_interval([0.856, 0.886])
    '85.6–88.6%'
    """
    return f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}%"


def points(difference: float) -> str:
    """A difference of shares in percentage points, signed.

    >>> points(0.0214), points(-0.0214), points(-0.0001)
    ('+2.1', '−2.1', '0.0')
    """
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in {"+0.0", "-0.0"} else text.replace("-", "−")


def points_interval(bounds: Sequence[float]) -> str:
    """A difference's bounds in percentage points.

    >>> points_interval([-0.021, 0.014])
    '−2.1 to +1.4'
    """
    return f"{points(bounds[0])} to {points(bounds[1])}"


def three_decimals(value: float) -> str:
    """A score, to compare in a column.

    >>> three_decimals(0.87149)
    '0.871'
    """
    return f"{value:.3f}"


def three_decimals_interval(bounds: Sequence[float]) -> str:
    """A score's bounds.

    >>> three_decimals_interval([0.856, 0.886])
    '0.856–0.886'
    """
    return f"{bounds[0]:.3f}–{bounds[1]:.3f}"


def three_digits(value: float) -> str:
    """A speed, as precise as it was measured.

    >>> three_digits(1234.5), three_digits(1.2345)
    ('1,234', '1.23')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_p_value(value: float) -> str:
    """A p-value in a sentence.

    >>> format_p_value(0.0312), format_p_value(1e-9)
    ('p = 0.031', 'p < 0.0001')
    """
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.2g}"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
