"""Fitting of labels: crowded tick labels are slanted or vertical; value labels that overlap are
rotated or removed."""

from __future__ import annotations

from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from .panels import BASELINE, VALUE

# rotation in degrees and font size of value labels, tried in this order
TURNS = ((0, 6.8), (90, 6.4))
GAP = 2  # pixels between two labels, at the figure's 100 dpi


def fit(figure: Figure, panels: list[Axes], obstacles: bool) -> None:
    """Slant tick labels and turn, shrink or remove value labels until no two overlap.

    ``obstacles``: value labels must also clear the error bars and the top edge (heat maps have
    neither).
    """
    figure.draw_without_rendering()
    for ax in panels:
        texts = [text for text in ax.get_xticklabels() if text.get_visible() and text.get_text()]
        if overlapping([text.get_window_extent() for text in texts]):
            slanted = 2 * texts[0].get_window_extent().height < ax.bbox.width / len(
                texts
            )  # at 30 degrees the distance between lines is halved
            longest = max(text.get_window_extent().width for text in texts) / figure.dpi
            figure.set_figheight(figure.get_figheight() + longest * (0.5 if slanted else 1.0))
            for other in panels:
                other.tick_params(axis="x", rotation=30 if slanted else 90)
                for text in other.get_xticklabels() if slanted else ():
                    text.set(ha="right", rotation_mode="anchor")
            break
    for turn, size in TURNS:
        figure.draw_without_rendering()
        if all(clear(ax, obstacles) for ax in panels):
            return
        for text in (text for ax in panels for text in value_texts(ax)):
            text.set(rotation=turn, fontsize=size)
    figure.draw_without_rendering()
    if not all(clear(ax, obstacles) for ax in panels):
        for text in [text for ax in panels for text in value_texts(ax)]:
            text.remove()


def value_texts(ax: Axes) -> list[Text]:
    return [text for text in ax.texts if text.get_gid() == VALUE]


def overlapping(boxes: list[Bbox]) -> bool:
    """Check whether any two of the boxes are closer than ``GAP``."""
    return any(first.padded(GAP).overlaps(second) for first, second in combinations(boxes, 2))


def clear(ax: Axes, obstacles: bool) -> bool:
    """Check that the value labels of one panel stay inside and overlap neither each other nor, with
    ``obstacles``, a bar or the baseline."""
    boxes = [text.get_window_extent() for text in value_texts(ax)]
    if not boxes or not obstacles:
        return not overlapping(boxes)
    bars = [
        path.get_extents(collection.get_transform()) for collection in ax.collections for path in collection.get_paths()
    ]
    bars += [patch.get_window_extent() for patch in ax.patches]
    bars += [line.get_window_extent() for line in ax.lines if line.get_gid() == BASELINE]
    hidden = any(box.overlaps(bar.padded(1)) for box in boxes for bar in bars)
    return not overlapping(boxes) and not hidden and max(box.y1 for box in boxes) < ax.bbox.y1 - 3
