"""The figures of a comparison, each as PNG bytes.

An arm has one colour in all of them. What kind of classifier an entry is shows in its markers and
lines, so also in print without colour.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullLocator,
)

from accel_gpt2.report.drawing import (
    DOTS_PER_INCH,
    INCHES_PER_LETTER,
    Theme,
    class_labels,
    legible_on,
    png,
    short_label,
    style,
)

_WIDTH = 7.4  # inches: what the page is wide
_LONGEST_NAME = 40
_LETTERS_ABOVE_PANEL = 22
_PANELS_IN_ROW = 3
_SERIES_OF_ARM = {3: 0, 5: 1, 4: 2, 7: 3, 1: 4, 8: 5, 6: 6, 2: 7}
# For each kind the markers of its entries, in their order, and its line.
_MARKERS = {
    "generative": "oh8H",
    "discriminative": "sDd",
    "masked": "^v<>",
    "hybrid": "*",
    "zero_shot": "X",
    "classical": "Pp",
}
_LINES: dict[str, Any] = {
    "generative": "-",
    "discriminative": (0, (6, 2)),
    "masked": (0, (1.2, 1.6)),
    "hybrid": (0, (7, 2, 1.5, 2)),
    "zero_shot": (0, (3, 5)),
    "classical": (0, (5, 1.5, 1.2, 1.5, 1.2, 1.5)),
}
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.3g}%")  # with the decimals that it needs
MOST_RIDGES = 8
MOST_ANNOTATED_CLASSES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How an entry is drawn in every figure; `series` is an index into a theme's."""

    id: str
    label: str
    kind: str
    series: int
    marker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """An accuracy with its interval, and that of every seed where there are several."""

    look: Look
    accuracy: float
    interval: Sequence[float] | None
    seeds: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Shares over x, in the order of x; `low` and `high` bound a band around them."""

    look: Look
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def entry_looks(entries: Sequence[Mapping[str, Any]]) -> dict[str, Look]:
    """The look of each entry by its id."""
    of_kind: dict[str, int] = {}
    looks: dict[str, Look] = {}
    for entry in entries:
        kind, arm = entry["kind"], entry["arm"]
        rank = of_kind[kind] = of_kind.get(kind, -1) + 1
        identity = short_label(entry["id"], otherwise=f"entry {len(looks)}", longest=6)
        name = short_label(entry["name"], otherwise=kind, longest=_LONGEST_NAME)
        looks[entry["id"]] = Look(
            id=identity,
            label=f"{identity}  {name}",
            kind=kind,
            series=_SERIES_OF_ARM.get(arm, arm % len(_SERIES_OF_ARM)),
            marker=_MARKERS[kind][rank % len(_MARKERS[kind])],
        )
    return looks


def accuracy_dots(dots: Sequence[Dot], majority: float | None, theme: Theme) -> bytes:
    """A row for each entry: its accuracy with the 95% interval, and its seeds as hollow circles."""
    with style(theme):
        figure, axes = _rows([dot.look for dot in dots], theme)
        for row, dot in enumerate(dots):
            color = theme.series[dot.look.series]
            if dot.interval:
                axes.plot(dot.interval, [row, row], color=color, linewidth=2.2, alpha=0.75)
            axes.plot(
                dot.accuracy, row, color=color, marker=dot.look.marker, markersize=8,
                markeredgecolor=theme.surface, markeredgewidth=0.6,
            )  # fmt: skip
            axes.plot(
                dot.seeds, [row + 0.3] * len(dot.seeds), color=color, marker="o", markersize=4,
                fillstyle="none", linestyle="none",
            )  # fmt: skip
            axes.annotate(
                f"{dot.accuracy:.1%}", (1.01, row), xycoords=axes.get_yaxis_transform(), va="center"
            )
        if majority is not None:
            _reference(axes, majority, "majority class", theme)
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.set_xlabel("accuracy")
        return png(figure)


def out_of_distribution_dots(
    scores: Sequence[tuple[Look, Mapping[str, float | None]]], theme: Theme
) -> bytes:
    """A row for each entry: the AUROC of each score, by the score's name."""
    markers = ("o", "D", "^")
    with style(theme):
        figure, axes = _rows([look for look, _ in scores], theme)
        for row, (look, aurocs) in enumerate(scores):
            color = theme.series[look.series]
            known = [x for x in aurocs.values() if x is not None]
            axes.plot([min(known), max(known)], [row, row], color=theme.grid, linewidth=2, zorder=1)
            for marker, auroc in zip(markers, aurocs.values(), strict=True):
                if auroc is not None:
                    axes.plot(
                        auroc, row, color=color, marker=marker, markersize=7.5, markeredgewidth=1.4,
                        fillstyle="full" if marker == "o" else "none",
                    )  # fmt: skip
        _reference(axes, 0.5, "chance", theme)
        axes.set_xlabel("AUROC")
        figure.legend(
            [
                Line2D([], [], color=theme.ink, marker=marker, linestyle="none",
                       fillstyle="full" if marker == "o" else "none")
                for marker in markers
            ],
            list(scores[0][1]),
            loc="outside upper center",
            ncols=len(markers),
        )  # fmt: skip
        return png(figure)


def share_lines(
    lines: Sequence[Line],
    theme: Theme,
    *,
    x_label: str,
    y_label: str,
    logarithmic: bool,
) -> bytes:
    """Shares of documents over x, one line for each entry; x in per cent unless logarithmic."""
    labels = [line.look.label for line in lines]
    num_columns = max(1, int(_WIDTH / (0.6 + 0.9 * INCHES_PER_LETTER * max(map(len, labels)))))
    num_legend_rows = -(-len(lines) // num_columns)
    with style(theme):
        figure = Figure(
            figsize=(_WIDTH, 4.1 + 0.2 * num_legend_rows), dpi=DOTS_PER_INCH, layout="constrained"
        )
        axes = figure.subplots()
        for line in lines:
            color = theme.series[line.look.series]
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.13, linewidth=0)
            axes.plot(
                line.x, line.y, label=line.look.label, color=color, linewidth=1.7,
                linestyle=_LINES[line.look.kind], marker=line.look.marker, markersize=6.5,
                markeredgecolor=theme.surface, markeredgewidth=0.5,
                markevery=max(1, len(line.x) // 10),
            )  # fmt: skip
        if logarithmic:
            axes.set_xscale("log")
            ticks = _apart([x for line in lines for x in line.x])
            axes.xaxis.set_major_locator(FixedLocator(ticks))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        else:
            axes.xaxis.set_major_formatter(_PERCENT)
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.set(xlabel=x_label, ylabel=y_label)
        figure.legend(loc="outside lower center", ncols=num_columns, handlelength=3.2)
        return png(figure)


def reliability_panels(
    panels: Sequence[tuple[Look, Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]],
    theme: Theme,
) -> bytes:
    """For each entry accuracy against confidence by bin, raw in grey and calibrated."""
    with style(theme):
        figure, grid = _panels([look for look, _, _ in panels], theme, height=2.15, share="both")
        for axes, (look, raw, calibrated) in zip(grid, panels, strict=True):
            axes.plot([0, 1], [0, 1], color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
            for bins, color, marker in (
                (raw, theme.muted, "x"),
                (calibrated, theme.series[look.series], "o"),
            ):
                filled = [row for row in bins if row["count"]]
                axes.plot(
                    [row["mean_confidence"] for row in filled],
                    [row["accuracy"] for row in filled],
                    color=color, marker=marker, markersize=4.5, linewidth=1.4,
                )  # fmt: skip
            axes.set(xlim=(0, 1.03), ylim=(0, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        figure.supxlabel("probability of the predicted class", fontsize=9.5)
        figure.supylabel("share that is right", fontsize=9.5)
        figure.legend(
            [
                Line2D([], [], color=theme.muted, marker="x", markersize=4.5),
                Line2D([], [], color=theme.ink, marker="o", markersize=4.5),
            ],
            ["raw", "calibrated (in the arm's colour)"],
            loc="outside upper center",
            ncols=2,
        )
        return png(figure)


def log_ratio_panels(
    panels: Sequence[tuple[Look, Sequence[float], Mapping[str, Sequence[int]]]],
    class_names: Sequence[str],
    theme: Theme,
) -> bytes:
    """For each entry the documents by log-ratio, one ridge for each class, the first one on top.

    More than MOST_RIDGES classes are pooled.
    """
    pooled = len(class_names) > MOST_RIDGES
    labels = ["all classes"] if pooled else class_labels(class_names, longest=14)
    height = 0.75 + 0.55 * len(labels)
    with style(theme):
        figure, grid = _panels([look for look, _, _ in panels], theme, height=height, share="y")
        for axes, (look, edges, counts) in zip(grid, panels, strict=True):
            color = theme.series[look.series]
            middles = (np.asarray(edges)[1:] + np.asarray(edges)[:-1]) / 2
            empty = np.zeros(len(middles))
            ridges = [np.asarray(counts.get(name, empty)) for name in class_names]
            for row, ridge in enumerate([np.sum(ridges, axis=0)] if pooled else ridges):
                top = row - 0.85 * ridge / max(ridge.max(), 1)
                axes.plot(middles, top, color=color, linewidth=1.4)
                axes.fill_between(middles, row, top, color=color, alpha=0.2, linewidth=0)
            axes.axvline(0, color=theme.ink, linewidth=1)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        grid[0].set_yticks(range(len(labels)), labels)
        grid[0].set_ylim(len(labels) - 0.9, -1)
        figure.supxlabel("log-ratio of the true class to the best other one, nats", fontsize=9.5)
        return png(figure)


def bits_per_byte_panels(
    panels: Sequence[tuple[Look, Sequence[Sequence[float | None]]]],
    class_names: Sequence[str],
    theme: Theme,
) -> bytes:
    """For each entry the bits per byte of each class's documents (rows) under each class's model
    (columns), coloured alike by the distance to the row's lowest value, which is framed."""
    num_classes = len(class_names)
    annotated = num_classes <= MOST_ANNOTATED_CLASSES
    matrices = [np.asarray(matrix, dtype=np.float64) for _, matrix in panels]  # None becomes NaN
    excesses = [_above_lowest(matrix) for matrix in matrices]
    largest = max(1e-12, *(float(excess.max()) for excess in excesses))
    colors = LinearSegmentedColormap.from_list("surface", [theme.surface, theme.warning])
    with style(theme):
        figure, grid = _panels([look for look, _ in panels], theme, height=2.3, share="both")
        for axes, matrix, excess in zip(grid, matrices, excesses, strict=True):
            image = axes.imshow(excess, cmap=colors, vmin=0, vmax=largest)
            axes.grid(visible=False)
            axes.tick_params(length=0)
            for row in range(num_classes):
                if np.isnan(matrix[row]).all():
                    continue
                lowest = np.nanargmin(matrix[row])
                axes.add_patch(
                    Rectangle(
                        (float(lowest) - 0.46, row - 0.46), 0.92, 0.92, fill=False,
                        edgecolor=theme.ink, linewidth=1.3 if annotated else 0.8,
                    )
                )  # fmt: skip
            if annotated:
                _annotate(axes, matrix, [image.to_rgba(row) for row in excess])
        if annotated:
            names = class_labels(class_names, longest=10)
            grid[0].set_xticks(range(num_classes), names, rotation=40, ha="right")
            grid[0].set_yticks(range(num_classes), names)
        else:
            every = range(0, num_classes, -(-num_classes // 8))
            grid[0].set_xticks(every, [str(index + 1) for index in every])
            grid[0].set_yticks(every, [str(index + 1) for index in every])
        for axes in grid[::_PANELS_IN_ROW]:
            axes.set_ylabel("documents of class")
        for axes in grid[-_PANELS_IN_ROW:]:
            axes.set_xlabel("model of class")
        colorbar = figure.colorbar(image, ax=figure.axes, shrink=0.8, aspect=30, pad=0.02)
        colorbar.outline.set_visible(False)
        colorbar.set_label("bits per byte above the row's lowest")
        return png(figure)


def _above_lowest(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How far each value is above its row's lowest; unknown ones are level with it."""
    lowest = np.where(np.isnan(matrix), np.inf, matrix).min(axis=1, keepdims=True)
    return np.where(np.isnan(matrix), 0.0, matrix - np.where(np.isinf(lowest), 0.0, lowest))


def _annotate(
    axes: Axes, matrix: npt.NDArray[np.float64], colors: Sequence[npt.NDArray[np.float64]]
) -> None:
    for row, column in np.ndindex(*matrix.shape):
        value = matrix[row, column]
        axes.text(
            column, row, "–" if np.isnan(value) else f"{value:.2f}", ha="center", va="center",
            fontsize=8, color=legible_on(colors[row][column]),
        )  # fmt: skip


def _rows(looks: Sequence[Look], theme: Theme) -> tuple[Figure, Axes]:
    """Axes with a row for each entry, the first one on top, named at the left."""
    figure = Figure(
        figsize=(_WIDTH, 1.1 + 0.36 * len(looks)), dpi=DOTS_PER_INCH, layout="constrained"
    )
    axes = figure.subplots()
    axes.set_yticks(range(len(looks)), [look.label for look in looks])
    axes.set_ylim(len(looks) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    for tick in axes.get_yticklabels():
        tick.set_color(theme.ink)
    axes.spines["left"].set_visible(False)
    return figure, axes


def _panels(
    looks: Sequence[Look], theme: Theme, *, height: float, share: Literal["both", "y"]
) -> tuple[Figure, list[Axes]]:
    """A panel for each entry, under the entry's name."""
    num_columns = min(_PANELS_IN_ROW, len(looks))
    num_rows = -(-len(looks) // num_columns)
    figure = Figure(
        figsize=(
            0.8 + (_WIDTH - 0.8) / _PANELS_IN_ROW * max(num_columns, 2),
            0.8 + height * num_rows,
        ),
        dpi=DOTS_PER_INCH,
        layout="compressed",
    )
    grid = figure.subplots(
        num_rows, num_columns, sharex=share == "both", sharey=True, squeeze=False
    )
    for axes in list(grid.flat)[len(looks) :]:
        axes.remove()
        # The panel above an empty place has no neighbour below to carry the labels.
    for column in range(num_columns):
        last = (len(looks) - 1 - column) // num_columns
        grid[last, column].tick_params(labelbottom=True)
    panels = list(grid.flat)[: len(looks)]
    for axes, look in zip(panels, looks, strict=True):
        lines = textwrap.wrap(look.label, _LETTERS_ABOVE_PANEL, max_lines=2, placeholder="…")
        axes.set_title("\n".join(lines), loc="left", fontsize=8.5)
    return figure, panels


def _reference(axes: Axes, x: float, name: str, theme: Theme) -> None:
    """A vertical dashed line with its name at its foot."""
    axes.axvline(x, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        name, (x, 1), xycoords=axes.get_xaxis_transform(), xytext=(0, 3),
        textcoords="offset points", ha="center", color=theme.muted, fontsize=8.5,
    )  # fmt: skip


def _apart(values: Sequence[float]) -> list[float]:
    """Of the distinct values, in order, those whose labels fit beside each other on a log axis;
    the largest always.

    >>> _apart([64, 256, 1024, 1100]), _apart([8, 8])
    ([64, 256, 1100], [8])
    """
    ordered = sorted(set(values), reverse=True)
    least = 0.07 * np.log(ordered[0] / ordered[-1])
    kept = ordered[:1]
    for value in ordered[1:]:
        if np.log(kept[-1] / value) >= least:
            kept.append(value)
    return kept[::-1]
