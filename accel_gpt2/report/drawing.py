"""What all figures share: the two themes, Matplotlib's settings, labels, and PNG bytes.

Matplotlib's object interface draws without pyplot, so no backend and no global figure is touched;
the same input gives the same bytes.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

CSS_PIXELS_PER_INCH = 96
PNG_PIXELS_PER_CSS_PIXEL = 1.5  # sharp on dense screens and in print, and still a small page
DOTS_PER_INCH = int(PNG_PIXELS_PER_CSS_PIXEL * CSS_PIXELS_PER_INCH)
_LONGEST_LABEL = 22
INCHES_PER_LETTER = 0.075  # at the font size of labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours of one figure.

    `series` are told apart with every common colour blindness (a test simulates them) and stand
    out from the surface.
    """

    surface: str
    ink: str
    muted: str
    grid: str
    accent: str  # the strong end of heatmaps
    warning: str  # the strong end of the bits-per-byte heatmap
    series: tuple[str, ...]


LIGHT = Theme(
    surface="#ffffff",
    ink="#1f2328",
    muted="#656d76",
    grid="#e3e7ec",
    accent="#0a5a9c",
    warning="#c2500a",
    series=(
        "#0072b2",
        "#d55e00",
        "#00a87e",
        "#b061ff",
        "#6b5000",
        "#152d75",
        "#6b0036",
        "#3900e5",
    ),
)
DARK = Theme(
    surface="#161b22",
    ink="#e6edf3",
    muted="#9aa4af",
    grid="#2b323b",
    accent="#3d9be0",
    warning="#e0762e",
    series=(
        "#56b4e9",
        "#ff8c42",
        "#3c8b77",
        "#c824ff",
        "#deffbd",
        "#5bff24",
        "#ff0544",
        "#f5c7de",
    ),
)


@contextmanager
def style(theme: Theme) -> Iterator[None]:
    """Matplotlib's own defaults and the theme, whatever a user's matplotlibrc says, until exit."""
    settings = {
        "font.size": 9.5,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "axes.facecolor": theme.surface,
        "figure.facecolor": theme.surface,
        "savefig.facecolor": theme.surface,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "legend.frameon": False,
        "text.parse_math": False,  # a `$` in a class name is a `$`
    }
    with matplotlib.style.context(["default", settings]):
        yield


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # A layout engine has made room for everything; finding that out again would take as long.
    box = "tight" if figure.get_layout_engine() is None else None
    # Without its version line the file depends on nothing but the drawing.
    figure.savefig(
        buffer, format="png", metadata={"Software": None}, bbox_inches=box, pad_inches=0.06
    )
    return buffer.getvalue()


def class_labels(class_names: Sequence[str], *, longest: int = _LONGEST_LABEL) -> list[str]:
    """Class names as Matplotlib can show them; one that it cannot show becomes its index, for
    instance `class 3`."""
    return [
        short_label(name, otherwise=f"class {index}", longest=longest)
        for index, name in enumerate(class_names)
    ]


def short_label(text: str, *, otherwise: str, longest: int = _LONGEST_LABEL) -> str:
    """A text on one line, cut to `longest` letters; `otherwise` where the font lacks a letter."""
    label = " ".join(text.split())
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    if not label or any(ord(letter) not in known for letter in label):
        label = otherwise
    if len(label) > longest:
        label = label[: longest - 1].rstrip() + "…"
    return label


def legible_on(color: npt.ArrayLike) -> str:
    """White or black, whichever stands out more on an RGB colour: always 4.5 to 1 or better.

    Relative luminance as WCAG 2.2 defines it; both contrasts are equal at 0.179.
    """
    rgb = np.asarray(color)[:3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "#ffffff" if linear @ (0.2126, 0.7152, 0.0722) < 0.179 else "#000000"
