"""The four figures of a run, each as PNG bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from accel_gpt2.report.drawing import (
    DOTS_PER_INCH,
    INCHES_PER_LETTER,
    Theme,
    class_labels,
    legible_on,
    png,
    style,
)
from accel_gpt2.report.read import ClassCurve

_MOST_CLASSES_IN_ONE_PANEL = 5


def loss_curves(curves: Sequence[ClassCurve], theme: Theme) -> bytes:
    """Training loss and validation, bits per token or document over optimizer steps.

    Up to five classes share one panel; more get a panel each on common axes.
    """
    if len(curves) <= _MOST_CLASSES_IN_ONE_PANEL:
        num_columns, num_rows, size = 1, 1, (7.4, 4.2)
    else:
        num_columns = 3 if len(curves) <= 9 else 4
        num_rows = -(-len(curves) // num_columns)
        size = (7.4 if num_columns == 3 else 9.4, 0.9 + 1.75 * num_rows)
    one_panel = num_columns == 1
    labels = class_labels([curve.class_name for curve in curves])
    with style(theme):
        figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
        grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
        panels = list(grid.flat)
        for index, curve in enumerate(curves):
            axes = panels[0] if one_panel else panels[index]
            color = theme.series[index] if one_panel else theme.series[0]
            _draw_curve(axes, curve, color=color, theme=theme)
            if not one_panel:
                axes.set_title(labels[index], loc="left")
        for axes in panels[len(curves) :] if not one_panel else []:
            axes.set_visible(False)
            # The panel above an empty place has no neighbour below to carry the step numbers.
        for column in range(num_columns):
            shown = [row for row in range(num_rows) if grid[row, column].get_visible()]
            grid[shown[-1], column].tick_params(labelbottom=True)
        panels[0].xaxis.set_major_locator(
            MaxNLocator(nbins=6 if one_panel else 3, steps=[1, 2, 5, 10], integer=True)
        )
        panels[0].set_xlim(left=0)
        figure.supxlabel("optimizer step", fontsize=9.5)
        figure.supylabel(f"bits per {curves[0].unit}", fontsize=9.5)

        color = theme.ink if one_panel else theme.series[0]
        kinds = [
            Line2D([], [], color=color, linewidth=1, alpha=0.6, label="training"),
            Line2D([], [], color=color, marker="o", markersize=4.5, label="validation"),
            Line2D([], [], color=color, marker="*", markersize=11, linestyle="none", label="best"),
        ]
        if one_panel:
            panels[0].legend(handles=kinds, loc="upper right")
            figure.legend(
                [Line2D([], [], color=color, linewidth=3) for color in theme.series[: len(labels)]],
                labels,
                loc="outside upper center",
                ncols=max(1, int(size[0] / (0.6 + INCHES_PER_LETTER * max(map(len, labels))))),
            )
        else:
            figure.legend(handles=kinds, loc="outside upper center", ncols=3)
        return png(figure)


def _draw_curve(axes: Axes, curve: ClassCurve, *, color: str, theme: Theme) -> None:
    axes.plot(
        [point.step for point in curve.training],
        [point.bits for point in curve.training],
        color=color,
        marker="." if len(curve.training) == 1 else "",  # one point makes no line
        linewidth=1,
        alpha=0.6,
    )
    axes.plot(
        [point.step for point in curve.validation],
        [point.bits for point in curve.validation],
        color=color,
        marker="o",
        markersize=4.5,
        linewidth=1.6,
    )
    if curve.best is not None:
        axes.plot(
            curve.best.step,
            curve.best.bits,
            color=color,
            marker="*",
            markersize=14,
            markeredgecolor=theme.surface,
            markeredgewidth=0.8,
        )


def confusion_matrix(confusion: npt.ArrayLike, class_names: Sequence[str], theme: Theme) -> bytes:
    """Documents by true class (rows) and predicted class (columns), coloured by row percentage."""
    counts = np.asarray(confusion, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    texts = [
        [
            f"{int(count):,}\n{share:.1%}" if count else "0"
            for count, share in zip(*row, strict=True)
        ]
        for row in zip(counts, shares, strict=True)
    ]
    with style(theme):
        figure, axes, colorbar = _matrix_figure(
            shares, texts, class_names, theme, strong=theme.accent, largest=1.0
        )
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        colorbar.set_label("share of the true class's documents")
        colorbar.ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        return png(figure)


def bits_per_byte_heatmap(
    bits_per_byte: npt.ArrayLike, class_names: Sequence[str], theme: Theme
) -> bytes:
    """Bits per byte of each class's documents (rows) under each class's model (columns).

    Coloured by the distance to the row's lowest value, which is framed.
    """
    values = np.asarray(bits_per_byte, dtype=np.float64)  # None becomes NaN
    filled = np.where(np.isnan(values), np.inf, values)
    lowest = filled.min(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        excess = np.where(np.isnan(values), 0.0, values - lowest)
    texts = [["–" if np.isnan(x) else f"{x:.3f}" for x in row] for row in values]
    with style(theme):
        figure, axes, colorbar = _matrix_figure(
            excess, texts, class_names, theme, strong=theme.warning, largest=None
        )
        for row, column in enumerate(filled.argmin(axis=1)):
            if not np.isnan(values[row, column]):
                axes.add_patch(
                    Rectangle(
                        (column - 0.46, row - 0.46), 0.92, 0.92, fill=False,
                        edgecolor=theme.ink, linewidth=1.6,
                    )
                )  # fmt: skip
        axes.set_xlabel("model of class")
        axes.set_ylabel("documents of class")
        colorbar.set_label("bits per byte above the row's lowest")
        return png(figure)


def _matrix_figure(
    values: npt.NDArray[np.float64],
    texts: Sequence[Sequence[str]],
    class_names: Sequence[str],
    theme: Theme,
    *,
    strong: str,
    largest: float | None,
) -> tuple[Figure, Axes, Colorbar]:
    """A square of annotated cells, from the surface's colour at 0 to `strong` at `largest`.

    Only the square has a fixed size: labels stand outside it, and saving makes room for them.
    """
    num_classes = len(class_names)
    labels = class_labels(class_names)
    cell_inches = float(np.clip(4.6 / num_classes, 0.52, 1.15))
    side = cell_inches * num_classes
    largest = largest or max(float(values.max()), 1e-12)
    figure = Figure(figsize=(side, side), dpi=DOTS_PER_INCH)
    axes = figure.add_axes((0, 0, 1, 1))
    image = axes.imshow(
        values,
        cmap=LinearSegmentedColormap.from_list("surface", [theme.surface, strong]),
        vmin=0.0,
        vmax=largest,
    )
    # Lines between the cells, and no frame around them.
    axes.set_xticks(np.arange(-0.5, num_classes), minor=True)
    axes.set_yticks(np.arange(-0.5, num_classes), minor=True)
    axes.grid(visible=False)
    axes.grid(visible=True, which="minor", color=theme.grid, linewidth=1)
    axes.spines[:].set_visible(False)
    axes.set_yticks(range(num_classes), labels)
    axes.set_xticks(range(num_classes), labels)
    if INCHES_PER_LETTER * max(map(len, labels)) > 0.95 * cell_inches:
        axes.tick_params(axis="x", labelrotation=40)
        for tick_label in axes.get_xticklabels():
            tick_label.set(ha="right", rotation_mode="anchor")
    axes.tick_params(which="both", length=0)
    for row in range(num_classes):
        for column in range(num_classes):
            cell = axes.text(
                column,
                row,
                texts[row][column],
                ha="center",
                va="center",
                fontsize=9 if cell_inches > 0.7 else 7,
                color=legible_on(image.to_rgba(values[row, column])),
            )
            cell.set_in_layout(False)  # it lies inside: measuring 400 of them takes seconds

    height = min(side, 3.2)
    colorbar = figure.colorbar(
        image, cax=figure.add_axes((1 + 0.25 / side, 1 - height / side, 0.16 / side, height / side))
    )
    colorbar.outline.set_visible(False)
    return figure, axes, colorbar


def reliability_diagram(blocks: Mapping[str, Sequence[Mapping[str, Any]]], theme: Theme) -> bytes:
    """Accuracy against confidence per bin, above the number of documents in each bin.

    `blocks` holds the bins of one or more kinds of probability by name, `raw` and `calibrated`.
    """
    with style(theme):
        figure = Figure(figsize=(6.2, 5.4), dpi=DOTS_PER_INCH, layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        upper.plot([0, 1], [0, 1], color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
        upper.annotate(
            "as sure as right", (0.1, 0.1), xytext=(6, -4), textcoords="offset points",
            color=theme.muted, rotation_mode="anchor", va="top", fontsize=8.5,
        )  # fmt: skip
        # Raw is orange with squares, calibrated blue with circles.
        for index, (name, bins) in enumerate(blocks.items()):
            color, marker = (theme.series[1], "s") if name == "raw" else (theme.series[0], "o")
            filled = [row for row in bins if row["count"]]
            upper.plot(
                [row["mean_confidence"] for row in filled],
                [row["accuracy"] for row in filled],
                color=color,
                marker=marker,
                markersize=5.5,
                linewidth=1.6,
                label=name,
            )
            width = 1 / len(bins) / (len(blocks) + 0.4)
            lower.bar(
                [
                    (row["lower"] + row["upper"]) / 2 + (index - (len(blocks) - 1) / 2) * width
                    for row in bins
                ],
                [row["count"] for row in bins],
                width=width,
                color=color,
            )
        upper.set(xlim=(0, 1.01), ylim=(0, 1.02), ylabel="share that is right")
        upper.legend(loc="upper left")
        lower.set_yscale("log")
        lower.set_ylim(bottom=0.5)
        lower.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        lower.set(ylabel="documents", xlabel="probability of the predicted class")
        lower.minorticks_off()
        return png(figure)
