"""Colours can be told apart by everybody, and labels survive any text."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import LinearSegmentedColormap, to_rgb

from accel_gpt2.report import drawing

THEMES = pytest.mark.parametrize("theme", [drawing.LIGHT, drawing.DARK], ids=["light", "dark"])

# Machado, Oliveira and Fernandes 2009, table 1, severity 1, on linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear_rgb(color):
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(linear):
    """Ottosson 2020: a space in which distances are those that the eye sees."""
    cones = np.cbrt(
        np.array(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ]
        )
        @ np.clip(linear, 0, 1)
    )
    return (
        np.array(
            [
                [0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660],
            ]
        )
        @ cones
    )


def contrast(a, b):
    """WCAG 2.2, from 1 to 21."""
    dark, light = sorted(linear_rgb(color) @ (0.2126, 0.7152, 0.0722) for color in (a, b))
    return (light + 0.05) / (dark + 0.05)


@THEMES
@pytest.mark.parametrize("vision", VISIONS)
def test_every_two_series_differ_to_every_eye(theme, vision):
    """With each colour blindness two of the eight differ by 0.1 or more (Okabe and Ito's least
    distance is 0.076), and each stands out from the surface by 2.9 to 1."""
    assert len(set(theme.series)) == 8
    for a, b in itertools.combinations(theme.series, 2):
        seen = [oklab(np.array(VISIONS[vision]) @ linear_rgb(color)) for color in (a, b)]
        assert np.linalg.norm(seen[0] - seen[1]) >= 0.1, (a, b)
    assert all(contrast(color, theme.surface) >= 2.9 for color in theme.series)


@THEMES
def test_cell_texts_stand_out(theme):
    """On any shade from the surface to the strong end the text has a contrast of 4.5 to 1."""
    for strong in (theme.accent, theme.warning):
        shades = LinearSegmentedColormap.from_list("", [theme.surface, strong])
        for position in np.linspace(0, 1, 41):
            shade = shades(position)
            assert contrast(shade, drawing.legible_on(shade)) >= 4.5, (strong, position)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("2\nlines", "2 lines"),
        ("中文", "other"),
        ("", "other"),
        ("a word that is long", "a word…"),
    ],
)
def test_labels(text, label):
    """Lines are joined, what the font lacks is replaced, the rest is cut."""
    assert drawing.short_label(text, otherwise="other", longest=8) == label
