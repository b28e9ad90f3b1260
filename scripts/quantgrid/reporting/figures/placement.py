"""Placement of direct labels: each next to its mark, clear of other labels and marks, inside the axes;
joined by a thin line where it had to move away, and these lines cross as little as possible."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

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
POINT = 72.0  # points of an inch

Place = tuple[float, float]
Line = tuple[Place, Place]


@dataclass
class Taken:
    """Occupied parts of a panel in pixels: boxes of marks and labels, and lines to and across labels."""

    boxes: list[Bbox]
    lines: list[Line] = field(default_factory=list)


def label_points(ax: Axes, marks: pd.DataFrame, x: str, y: str, text: str) -> list[Annotation]:
    """Label the ``marks`` (columns ``x``, ``y`` and ``text``) of a drawn panel; a label for which no
    place is free is left out.

    The figure must have been drawn, so that texts have extents.
    """
    taken = Taken(dots(ax))
    found = [
        _placed(ax, (row[x], row[y]), textwrap.fill(str(row[text]), CHARACTERS), taken)
        for row in marks.to_dict("records")
    ]
    return [label for label in found if label is not None]


def dots(ax: Axes) -> list[Bbox]:
    """Extents of the marks of a panel, in pixels."""
    found = []
    for line in ax.lines:
        if line.get_marker() not in ("", "None", None, " "):
            places = ax.transData.transform(line.get_xydata()) if len(line.get_xydata()) else []
            found += [Bbox.from_bounds(px - DOT, py - DOT, 2 * DOT, 2 * DOT) for px, py in places]
    return found


def _placed(ax: Axes, at: Place, text: str, taken: Taken) -> Annotation | None:
    """Place one label: at the nearest free place whose line crosses no other, else at the nearest."""
    trial = _annotation(ax, at, text, (0.0, 0.0), 1)
    size = text_box(trial)
    trial.remove()
    mark = tuple(ax.transData.transform(at))
    free = []
    for shift, side in candidates():
        box = _box(mark, shift, side, size, ax.figure.dpi / POINT)
        inside = ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 and ax.bbox.y0 <= box.y0 and box.y1 <= ax.bbox.y1
        if inside and not any(box.overlaps(other) for other in taken.boxes):
            lines = _lines(mark, box)
            free.append((sum(_cross(one, other) for one in lines for other in taken.lines), shift, side, box))
            if not free[-1][0]:
                break
    if not free:
        return None
    _, shift, side, box = min(free, key=lambda place: place[0])
    taken.boxes.append(box)
    taken.lines += _lines(mark, box)
    return _annotation(ax, at, text, shift, side)


def _annotation(ax: Axes, at: Place, text: str, shift: Place, side: int) -> Annotation:
    look: dict[str, Any] = {"fontsize": SIZE, "color": INK, "gid": LABEL, "zorder": 5, "va": "center"}
    label = ax.annotate(
        text,
        at,
        shift,
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.3},
        arrowprops=LEADER if max(map(abs, shift)) > FAR else None,
        **look,
    )
    label.set_in_layout(False)
    return label


def _box(mark: Place, shift: Place, side: int, size: Bbox, scale: float) -> Bbox:
    """Extent of a label of this ``size`` with its offset from ``mark``, with a margin of a pixel."""
    left = mark[0] + shift[0] * scale - (size.width if side < 0 else 0.0)
    low = mark[1] + shift[1] * scale - size.height / 2
    return Bbox.from_bounds(left, low, size.width, size.height).padded(1)


def _lines(mark: Place, box: Bbox) -> list[Line]:
    """Lines of a label that others should not cross: from its mark to its centre, and its diagonals."""
    centre = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
    return [(mark, centre), ((box.x0, box.y0), (box.x1, box.y1)), ((box.x0, box.y1), (box.x1, box.y0))]


def _cross(one: Line, other: Line) -> bool:
    """Check whether two segments cross."""

    def turn(a: Place, b: Place, c: Place) -> bool:
        return (b[0] - a[0]) * (c[1] - a[1]) > (b[1] - a[1]) * (c[0] - a[0])

    (a, b), (c, d) = one, other
    return turn(a, b, c) != turn(a, b, d) and turn(c, d, a) != turn(c, d, b)


def text_box(label: Annotation) -> Bbox:
    """Extent of the words of a label without the line to its mark."""
    label.get_window_extent()  # moves the words to their place
    return Text.get_window_extent(label)


def candidates() -> Iterator[tuple[Place, int]]:
    """Offsets in points and sides, the nearest first."""
    shifts = [
        ((aside * side, ring * STEP), side) for ring in range(-RINGS, RINGS + 1) for aside in ASIDE for side in (1, -1)
    ]
    yield from sorted(shifts, key=lambda shift: (math.hypot(*shift[0]), -shift[1]))
