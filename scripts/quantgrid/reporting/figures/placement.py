"""Placement of direct labels: a column right of the marks, in the order of their heights, each joined
with its mark by a thin line; labels change places until the lines do not cross."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from ..style import INK, MUTED

LABEL = "label"  # gid of the placed labels
SIZE = 6.8  # points
CHARACTERS = (30, 24, 18, 12)  # of a line of a label: the first whose lines fit
ASIDE, GAP = 12.0, 1.5  # points between the last mark and the column, and between labels
LEADER = {"arrowstyle": "-", "color": MUTED, "lw": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": (0.0, 0.5)}
DOT = 4.0  # pixels of a mark on each side of its middle
POINT = 72.0  # points of an inch

Place = tuple[float, float]


def label_points(ax: Axes, marks: pd.DataFrame, x: str, y: str, text: str) -> list[Annotation]:
    """Label the ``marks`` (columns ``x``, ``y`` and ``text``) of a drawn panel; of more labels than fit, those
    in the middle are left out.

    The figure must have been drawn, so that texts have extents.
    """
    pixel = ax.figure.dpi / POINT
    rows = marks.sort_values([y, x], ascending=False, kind="stable").to_dict("records")
    column = max((box.x1 for box in dots(ax)), default=ax.bbox.x0) + ASIDE * pixel
    sized = [_fitted(ax, str(row[text]), ax.bbox.x1 - column) for row in rows]
    texts, heights = [words for words, _ in sized], [box.height + GAP * pixel for _, box in sized]
    order = list(range(len(rows)))
    while sum(heights[at] for at in order) > ax.bbox.height:
        del order[len(order) // 2]
    at = [tuple(ax.transData.transform((row[x], row[y]))) for row in rows]
    order, middles = _untangled(order, at, heights, column, (ax.bbox.y0, ax.bbox.y1))
    return [
        _annotation(ax, (rows[n][x], rows[n][y]), texts[n], ((column - at[n][0]) / pixel, (middle - at[n][1]) / pixel))
        for n, middle in zip(order, middles)
    ]


def dots(ax: Axes) -> list[Bbox]:
    """Extents of the marks of a panel, in pixels."""
    found = []
    for line in ax.lines:
        if line.get_marker() not in ("", "None", None, " "):
            places = ax.transData.transform(line.get_xydata()) if len(line.get_xydata()) else []
            found += [Bbox.from_bounds(px - DOT, py - DOT, 2 * DOT, 2 * DOT) for px, py in places]
    return found


def _untangled(
    order: Sequence[int], marks: Sequence[Place], heights: Sequence[float], column: float, limits: Place
) -> tuple[list[int], list[float]]:
    """Order the labels, the highest first, so that the lines from their marks to the column do not cross; with
    the middle heights of the labels.

    Two labels whose lines cross change places, which shortens the lines; the number of changes is bounded.
    """
    found = list(order)
    for _ in range(len(found) ** 2):
        middles = spread_out([marks[n][1] for n in found], [heights[n] for n in found], limits)
        lines = [(marks[n], (column, middle)) for n, middle in zip(found, middles)]
        pair = next((pair for pair in combinations(range(len(found)), 2) if crossing(*(lines[n] for n in pair))), None)
        if pair is None:
            break
        found[pair[0]], found[pair[1]] = found[pair[1]], found[pair[0]]
    return found, spread_out([marks[n][1] for n in found], [heights[n] for n in found], limits)


def spread_out(wanted: Sequence[float], heights: Sequence[float], limits: Place) -> list[float]:
    """Place boxes of these ``heights`` above one another in the given order, the highest first, within
    ``limits`` and without overlap, with the least squared distance of their middles to those ``wanted``."""
    from scipy.optimize import isotonic_regression

    if not len(wanted):
        return []
    tall = np.asarray(heights, dtype=float)
    below = np.concatenate([[0.0], np.cumsum((tall[:-1] + tall[1:]) / 2)])
    found = isotonic_regression(np.asarray(wanted, dtype=float) + below, increasing=False).x
    low, high = limits[0] + tall[-1] / 2 + below[-1], limits[1] - tall[0] / 2
    return (found.clip(low, high) - below).tolist()


def crossing(one: tuple[Place, Place], other: tuple[Place, Place]) -> bool:
    """Check whether two segments cross."""

    def turn(a: Place, b: Place, c: Place) -> float:
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    (a, b), (c, d) = one, other
    return turn(a, b, c) * turn(a, b, d) < 0 and turn(c, d, a) * turn(c, d, b) < 0


def wrapped(words: str, count: int) -> str:
    """Break a label into lines of ``count`` characters, before a plus rather than behind it."""
    return textwrap.fill(words.replace(" + ", " +\u00a0"), count).replace("\u00a0", " ")


def _fitted(ax: Axes, words: str, width: float) -> tuple[str, Bbox]:
    """Break a label into lines no wider than ``width`` pixels, or the narrowest; with its extent."""
    for count in CHARACTERS:
        lines = wrapped(words, count)
        trial = _annotation(ax, (ax.get_xlim()[0], ax.get_ylim()[0]), lines, (0.0, 0.0))
        box = text_box(trial)
        trial.remove()
        if box.width <= width:
            break
    return lines, box


def _annotation(ax: Axes, at: Place, words: str, shift: Place) -> Annotation:
    """Write a label ``shift`` points from its mark."""
    look: dict[str, Any] = {"fontsize": SIZE, "color": INK, "gid": LABEL, "zorder": 5, "ha": "left", "va": "center"}
    label = ax.annotate(words, at, shift, textcoords="offset points", arrowprops=LEADER, **look)
    label.set_in_layout(False)
    return label


def text_box(label: Annotation) -> Bbox:
    """Extent of the words of a label without the line to its mark."""
    label.get_window_extent()  # moves the words to their place
    return Text.get_window_extent(label)
