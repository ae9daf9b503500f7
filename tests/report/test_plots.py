"""The figures: what is drawn, and that drawing leaves Matplotlib as it was."""

import dataclasses
import io
import math
import subprocess
import sys
import warnings

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from accel_gpt2.report import drawing, plots
from accel_gpt2.report.read import ClassCurve, TrainingPoint, ValidationPoint

AWKWARD = [
    "a $\\bad{$ and $y$",
    "_under",
    "中文",
    "two\nlines",
    "",
    "x" * 80,
    "<b>",
    "Ünïcode",
    "\\frac{",
]


def class_curves(names):
    return [
        ClassCurve(
            class_index=index,
            class_name=name,
            unit="token",
            training=tuple(
                TrainingPoint(step=step, bits=6 + index + 5 / step) for step in range(1, 30)
            ),
            validation=tuple(
                ValidationPoint(
                    step=step,
                    bits=6.5 + index - step / 100,
                    bits_per_byte=None,
                    best=True,
                )
                for step in (10, 20)
            ),
            num_tokens=None,
            peak_memory_bytes=None,
        )
        for index, name in enumerate(names)
    ]


def reliability_blocks():
    filled = {"lower": 0.5, "upper": 1.0, "count": 9, "mean_confidence": 0.8, "accuracy": 0.6}
    empty = {"lower": 0.0, "upper": 0.5, "count": 0, "mean_confidence": None, "accuracy": None}
    return {"raw": [empty, filled], "calibrated": [empty, filled]}


def all_figures(names, theme):
    square = np.arange(len(names) ** 2).reshape(len(names), -1)
    return [
        plots.loss_curves(class_curves(names), theme),
        plots.confusion_matrix(square, names, theme),
        plots.bits_per_byte_heatmap(square / 7, names, theme),
        plots.reliability_diagram(reliability_blocks(), theme),
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The figure objects themselves, in place of their PNGs."""
    monkeypatch.setattr(plots, "png", lambda figure: figure)
    return plots


@pytest.mark.parametrize("names", [["ham", "spam"], AWKWARD], ids=["two", "awkward"])
def test_every_figure_is_a_picture_and_warns_of_nothing(names):
    """Names that break mathematics, legends or fonts give real pictures without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = all_figures(names, drawing.LIGHT)
    assert len(figures) == 4
    for png in figures:
        pixels = matplotlib.image.imread(io.BytesIO(png))
        assert min(pixels.shape[:2]) > 250
        assert 0.05 < pixels[..., :3].std() < 0.5


def test_twenty_classes_have_a_panel_each(drawn):
    """Beyond five classes every class has its own panel on common axes, named by its title."""
    names = [f"class {letter}" for letter in "abcdefghijklmnopqrst"]
    figure = drawn.loss_curves(class_curves(names), drawing.LIGHT)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert titles == names
    assert len({axes.get_ylim() for axes in figure.axes}) == 1


def test_curves_show_what_was_logged(drawn):
    """Training, validation and the star of each class hold its own numbers; units are named."""
    curves = class_curves(["ham", "spam"])
    figure = drawn.loss_curves(curves, drawing.LIGHT)
    lines = figure.axes[0].lines
    assert len(lines) == 6
    for index, curve in enumerate(curves):
        training, validation, best = lines[3 * index : 3 * index + 3]
        assert list(training.get_ydata()) == [point.bits for point in curve.training]
        assert list(validation.get_xdata()) == [10, 20]
        assert list(best.get_xdata()) == [20]
        assert training.get_color() == validation.get_color() == drawing.LIGHT.series[index]
        assert training.get_linewidth() < validation.get_linewidth()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ham", "spam"]
    assert figure.get_supylabel() == "bits per token"
    assert figure.get_supxlabel() == "optimizer step"


def test_losses_of_documents_are_named_so(drawn):
    """The axis of a classification head's losses says bits per document."""
    curves = [dataclasses.replace(class_curves(["all classes"])[0], unit="document")]
    assert drawn.loss_curves(curves, drawing.LIGHT).get_supylabel() == "bits per document"


def cell_texts(figure):
    return {
        (round(text.get_position()[1]), round(text.get_position()[0])): text.get_text()
        for text in figure.axes[0].texts
    }


def test_confusion_rows_are_true_classes(drawn):
    """Each cell has its count and its share of the row; rows are true classes."""
    figure = drawn.confusion_matrix([[30, 10], [0, 1500]], ["ham", "spam"], drawing.LIGHT)
    assert cell_texts(figure) == {
        (0, 0): "30\n75.0%",
        (0, 1): "10\n25.0%",
        (1, 0): "0",
        (1, 1): "1,500\n100.0%",
    }
    axes = figure.axes[0]
    assert axes.get_ylabel() == "true class"
    assert axes.get_xlabel() == "predicted class"
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25], [0, 1]])


def test_the_lowest_value_of_each_row_is_framed(drawn):
    """Cells are coloured by their distance to the row's lowest; an empty class's row is dashes."""
    matrix = [[1.2, 1.5, 1.4], [1.6, 1.9, 1.3], [None, math.nan, None]]
    figure = drawn.bits_per_byte_heatmap(matrix, ["a", "b", "c"], drawing.LIGHT)
    axes = figure.axes[0]
    frames = {(round(p.get_y() + 0.46), round(p.get_x() + 0.46)) for p in axes.patches}
    assert frames == {(0, 0), (1, 2)}
    np.testing.assert_allclose(
        axes.images[0].get_array(), [[0, 0.3, 0.2], [0.3, 0.6, 0], [0, 0, 0]], atol=1e-12
    )
    assert cell_texts(figure)[0, 1] == "1.500"
    assert cell_texts(figure)[2, 0] == "–"


def test_reliability_points_leave_empty_bins_out(drawn):
    """Both kinds of probability have their points and their bars; empty bins have no point."""
    figure = drawn.reliability_diagram(reliability_blocks(), drawing.LIGHT)
    upper, lower = figure.axes
    labelled = {line.get_label(): line for line in upper.lines if line.get_label()[:1] != "_"}
    assert set(labelled) == {"raw", "calibrated"}
    for line in labelled.values():
        assert line.get_xydata().tolist() == [[0.8, 0.6]]
    assert [bar.get_height() for bar in lower.patches] == [0, 9, 0, 9]


def test_the_same_input_gives_the_same_bytes_whatever_the_settings():
    """A user's matplotlibrc neither changes the figures nor is changed by them."""
    curves = class_curves(["ham", "spam"])
    first = plots.loss_curves(curves, drawing.DARK)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 20}):
        before = dict(matplotlib.rcParams)
        second = plots.loss_curves(curves, drawing.DARK)
        assert dict(matplotlib.rcParams) == before
    assert first == second


def test_the_report_loads_neither_pyplot_nor_torch():
    """No backend is chosen for the process, and a report needs no deep learning."""
    code = (
        "import sys, accel_gpt2.report; "
        "print([m for m in ('matplotlib.pyplot', 'torch', 'transformers', 'sklearn') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
