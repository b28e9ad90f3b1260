"""Placement of direct labels: each next to its mark, clear of other labels and marks, inside the
axes; joined by a thin line where it had to move away."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from ..style import INK, MUTED

LABEL = "label"  # gid of the placed labels
SIZE = 6.8  # points
CHARACTERS = 30  # of a line of a label
STEP, RINGS = 9.0, 14  # points between candidate heights, and their number on each side
ASIDE = (6.0, 20.0, 40.0, 70.0)  # points between a mark and its label
FAR = 14.0  # points: beyond, a line joins a label with its mark
LEADER = {"arrowstyle": "-", "color": MUTED, "lw": 0.5, "shrinkA": 0, "shrinkB": 2}
DOT = 4.0  # pixels around a mark that labels avoid


def label_points(ax: Axes, marks: pd.DataFrame, x: str, y: str, text: str) -> list[Annotation]:
    """Label the ``marks`` (columns ``x``, ``y`` and ``text``) of a drawn panel; a label for which no
    place is free is left out.

    The figure must have been drawn, so that texts have extents.
    """
    taken = dots(ax)
    placed: list[Annotation] = []
    for row in marks.to_dict("records"):
        label = _placed(ax, (row[x], row[y]), textwrap.fill(str(row[text]), CHARACTERS), taken)
        if label is not None:
            placed.append(label)
            taken.append(text_box(label).padded(1))
    return placed


def dots(ax: Axes) -> list[Bbox]:
    """Extents of the marks of a panel, in pixels."""
    found = []
    for line in ax.lines:
        if line.get_marker() not in ("", "None", None, " "):
            places = ax.transData.transform(line.get_xydata()) if len(line.get_xydata()) else []
            found += [Bbox.from_bounds(px - DOT, py - DOT, 2 * DOT, 2 * DOT) for px, py in places]
    return found


def _placed(ax: Axes, at: tuple[float, float], text: str, taken: list[Bbox]) -> Annotation | None:
    for shift, side in candidates():
        label = ax.annotate(
            text,
            at,
            shift,
            textcoords="offset points",
            ha={1: "left", -1: "right"}[side],
            va="center",
            fontsize=SIZE,
            color=INK,
            gid=LABEL,
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.3},
            arrowprops=LEADER if max(map(abs, shift)) > FAR else None,
        )
        label.set_in_layout(False)
        box = text_box(label)
        inside = ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 + 1 and ax.bbox.y0 <= box.y0 and box.y1 <= ax.bbox.y1
        if inside and not any(box.overlaps(other) for other in taken):
            return label
        label.remove()
    return None


def text_box(label: Annotation) -> Bbox:
    """Extent of the words of a label without the line to its mark."""
    label.get_window_extent()  # moves the words to their place
    return Text.get_window_extent(label)


def candidates() -> Iterator[tuple[tuple[float, float], int]]:
    """Offsets in points and sides, the nearest first."""
    shifts = [
        ((aside * side, ring * STEP), side) for ring in range(-RINGS, RINGS + 1) for aside in ASIDE for side in (1, -1)
    ]
    yield from sorted(shifts, key=lambda shift: (math.hypot(*shift[0]), -shift[1]))
