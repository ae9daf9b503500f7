"""The comparison's figures: what is drawn, in which colour, and for every eye."""

import warnings

import numpy as np
import pytest

from accel_gpt2.report import comparison_plots, drawing
from accel_gpt2.report.comparison_plots import Dot, Line, entry_looks

from .comparisons import ARMS

AWKWARD = ["a $\\bad{$ and $y$", "中文", "two\nlines", "", "x" * 80, "<b>", "_under"]


def looks_of(names=None):
    """The looks of all entries, in order; with other names where they are given."""
    entries = [
        {"id": id_, "arm": int(id_[0]), "kind": kind, "name": name} for id_, kind, name, _ in ARMS
    ]
    for entry, name in zip(entries, names or [], strict=False):
        entry["name"] = name
    return list(entry_looks(entries).values())


@pytest.fixture
def drawn(monkeypatch):
    """The figure objects themselves, in place of their PNGs."""
    monkeypatch.setattr(comparison_plots, "png", lambda figure: figure)
    return comparison_plots


def test_an_arm_has_one_colour_and_an_entry_one_marker():
    """Eight arms have eight colours; no two entries have both the same marker and colour."""
    looks = looks_of()
    series = {int(look.id[0]): set() for look in looks}
    for look in looks:
        series[int(look.id[0])].add(look.series)
    assert all(len(indices) == 1 for indices in series.values())
    assert sorted(index for indices in series.values() for index in indices) == list(range(8))
    assert len({(look.marker, look.series) for look in looks}) == len(looks) == 11


def test_kinds_are_told_apart_without_colour():
    """No marker and no line belongs to two kinds, and within a kind the markers differ."""
    kinds = {kind for _, kind, _, _ in ARMS}
    lines = [str(comparison_plots._LINES[kind]) for kind in kinds]
    assert len(set(lines)) == len(kinds) == 6
    markers = [look.marker for look in looks_of()]
    assert len(set(markers)) == len(markers)


def test_dots_hold_accuracy_interval_and_seeds(drawn):
    """Each row has its bar, its dot and its seeds below them, in the arm's colour."""
    look = looks_of()[3]
    dots = [Dot(look=look, accuracy=0.9, interval=[0.88, 0.92], seeds=[0.9, 0.91])]
    figure = drawn.accuracy_dots(dots, 0.5, drawing.LIGHT)
    axes = figure.axes[0]
    bar, dot, seeds, majority = axes.lines
    assert list(bar.get_xdata()) == [0.88, 0.92]
    assert list(dot.get_xdata()) == [0.9]
    assert list(seeds.get_xdata()) == [0.9, 0.91]
    assert min(seeds.get_ydata()) > dot.get_ydata()[0]
    assert {line.get_color() for line in (bar, dot, seeds)} == {drawing.LIGHT.series[look.series]}
    assert list(majority.get_xdata()) == [0.5, 0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3  gpt2 per class"]
    assert "90.0%" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("logarithmic", [True, False])
def test_lines_hold_their_points_and_their_band(drawn, logarithmic):
    """x and y are those given, the legend stands outside the axes, x is named."""
    look = looks_of()[5]
    line = Line(
        look=look, x=[1, 2, 4], y=[0.5, 0.6, 0.7], low=[0.4, 0.5, 0.6], high=[0.6, 0.7, 0.8]
    )
    figure = drawn.share_lines(
        [line], drawing.DARK, x_label="tokens", y_label="accuracy", logarithmic=logarithmic
    )
    axes = figure.axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.6], [4, 0.7]]
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((0.4, 0.8))
    assert axes.get_xscale() == ("log" if logarithmic else "linear")
    assert axes.get_legend() is None
    assert [text.get_text() for text in figure.legends[0].texts] == ["5  gpt2 with a head"]
    assert axes.get_xlabel() == "tokens"


def test_reliability_panels_leave_empty_bins_out(drawn):
    """Raw is grey, calibrated in the arm's colour; a bin without documents has no point."""
    look = looks_of()[0]
    filled = {"lower": 0.5, "upper": 1.0, "count": 9, "mean_confidence": 0.8, "accuracy": 0.6}
    empty = {"lower": 0.0, "upper": 0.5, "count": 0, "mean_confidence": None, "accuracy": None}
    figure = drawn.reliability_panels([(look, [empty, filled], [filled])], drawing.LIGHT)
    _, raw, calibrated = figure.axes[0].lines
    assert raw.get_xydata().tolist() == calibrated.get_xydata().tolist() == [[0.8, 0.6]]
    assert raw.get_color() == drawing.LIGHT.muted
    assert calibrated.get_color() == drawing.LIGHT.series[look.series]


def test_ridges_stand_on_their_class(drawn):
    """One ridge per class, its height by its own largest bin; beyond eight classes one of all."""
    edges, counts = [-2.0, 0.0, 2.0, 4.0], {"ham": [0, 2, 4], "spam": [1, 0, 0]}
    panels = [(looks_of()[3], edges, counts)]
    figure = drawn.log_ratio_panels(panels, ["ham", "spam"], drawing.LIGHT)
    axes = figure.axes[0]
    ham, spam, zero = axes.lines
    assert list(ham.get_xdata()) == [-1, 1, 3]
    np.testing.assert_allclose(ham.get_ydata(), [0, -0.425, -0.85])
    np.testing.assert_allclose(spam.get_ydata(), [0.15, 1, 1])
    assert list(zero.get_xdata()) == [0, 0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ham", "spam"]
    names = [f"class {index}" for index in range(9)]
    panels = [(looks_of()[3], edges, {name: [1, 0, 2] for name in names})]
    axes = drawn.log_ratio_panels(panels, names, drawing.LIGHT).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all classes"]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [-0.425, 0, -0.85])


def test_heatmaps_have_one_scale_and_frame_the_lowest(drawn):
    """Colour is the distance to the row's lowest, alike in all panels; unknown ones are dashes."""
    looks = looks_of()
    panels = [(looks[3], [[1.2, 1.5], [1.6, 1.4]]), (looks[4], [[1.0, None], [None, None]])]
    figure = drawn.bits_per_byte_panels(panels, ["ham", "spam"], drawing.LIGHT)
    first, second = figure.axes[:2]
    np.testing.assert_allclose(first.images[0].get_array(), [[0, 0.3], [0.2, 0]], atol=1e-12)
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, pytest.approx(0.3))
    assert [round(frame.get_x() + 0.46) for frame in first.patches] == [0, 1]
    assert len(second.patches) == 1
    assert [text.get_text() for text in second.texts] == ["1.00", "–", "–", "–"]


def test_out_of_distribution_scores_that_are_unknown_are_left_out(drawn):
    """A head has no likelihood: its row has one dot."""
    looks = looks_of()
    scores = {"likelihood": 0.4, "likelihood per token": 0.9, "largest probability": 0.7}
    head = {**scores, "likelihood": None, "likelihood per token": None}
    figure = drawn.out_of_distribution_dots([(looks[3], scores), (looks[5], head)], drawing.LIGHT)
    dots = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in dots] == [
        (0.4, 0),
        (0.9, 0),
        (0.7, 0),
        (0.7, 1),
    ]
    assert [text.get_text() for text in figure.legends[0].texts] == list(scores)


@pytest.mark.parametrize("num_classes", [2, 20])
def test_awkward_names_and_many_classes_warn_of_nothing(num_classes):
    """Names that break mathematics, fonts or legends give pictures no wider than the page."""
    looks = looks_of(AWKWARD)[:7]
    names = [*AWKWARD, *(f"class {index}" for index in range(13))][:num_classes]
    matrix = np.arange(num_classes**2).reshape(num_classes, -1).tolist()
    lines = [Line(look=look, x=[1, 2], y=[0, 1], low=[0, 1], high=[0, 1]) for look in looks]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pngs = [
            comparison_plots.accuracy_dots(
                [Dot(look=look, accuracy=0.5, interval=None, seeds=[]) for look in looks],
                None,
                drawing.LIGHT,
            ),
            comparison_plots.share_lines(
                lines, drawing.LIGHT, x_label="x", y_label="y", logarithmic=True
            ),
            comparison_plots.log_ratio_panels(
                [(look, [-1, 0, 1], {name: [1, 2] for name in names}) for look in looks[:4]],
                names,
                drawing.LIGHT,
            ),
            comparison_plots.bits_per_byte_panels(
                [(look, matrix) for look in looks[:4]], names, drawing.LIGHT
            ),
        ]
    for png in pngs:
        width = int.from_bytes(png[16:20], "big") / drawing.PNG_PIXELS_PER_CSS_PIXEL
        assert 300 < width < 760
