"""Drawing of one panel of a figure, per kind: dots, bars, lines (heat maps: ``heatmap.py``).

Every ``draw_`` function takes the matplotlib axes, the panel's marks (rows of ``figures.points``)
and the :class:`.scene.Scene` of the whole figure.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..style import INK, significant, superscript
from .scene import SPREAD, Scene, clip, drawable

TICK = 27  # characters of a tick label
# gids of value labels, which labels.py fits or removes, and of objects that they must not cover
VALUE, BASELINE = "value", "baseline"


def prepare(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """Set up axes, grid, ticks and the baseline with its value at the right edge."""
    (low, high), xs = scene.limits[panel.panel.iloc[0]], scene.xs[panel.panel.iloc[0]]
    ax.set_yscale("log" if scene.log else "linear")
    ax.set_ylim(low, high)
    ax.set_xlim(-0.5, len(xs) - 0.5)
    ax.set_xticks(range(len(xs)), [clip(text, TICK) for text in xs])
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")
    scale_ticks(ax, scene.log, low, high)
    for value in panel.value[panel.baseline & drawable(panel.value, scene.log)]:
        ax.axhline(value, color=INK, lw=0.9, ls=(0, (4, 2)), zorder=2.5, gid=BASELINE)
        ax.annotate(
            significant(value, 4),
            (1, value),
            (2, 0),
            ax.get_yaxis_transform(),
            "offset points",
            va="center",
            fontsize=6.8,
            color=INK,
        )


def scale_ticks(ax: Axes, log: bool, low: float, high: float) -> None:
    """Set plain numbers on the value axis; on a log axis 1-2-5 or, within less than a decade,
    evenly spaced values."""
    if log:
        ticks = [
            tick for tick in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= tick <= high
        ]
        digits = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
        ax.yaxis.set_major_locator(FixedLocator(ticks) if high < 6 * low else LogLocator(subs=digits, numticks=12))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(tick_text))


def tick_text(value: float, _: int) -> str:
    if value and not 1e-4 <= abs(value) < 1e5:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        mantissa = value / 10.0**exponent
        return f"10{superscript(exponent)}" if math.isclose(mantissa, 1) else f"{mantissa:g}×10{superscript(exponent)}"
    return f"{value:.10g}"


def edge_marks(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """Draw crosses at the top edge for failed cells, triangles at the bottom edge for values not
    representable on a log axis."""
    for mark in panel[~panel.baseline].itertuples():
        failed = mark.status != "ok"
        if failed or (scene.log and mark.value <= 0):
            place, color = scene.place(mark), scene.look(mark.series)[0]
            edge = ax.get_xaxis_transform()
            ax.plot(
                [place],
                [1.0 if failed else 0.0],
                "x" if failed else "v",
                color=color,
                transform=edge,
                clip_on=False,
                ms=5.5,
                mew=1.6,
                zorder=5,
            )


def hollow_marks(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """Draw hollow markers for cells of which a training kept its start."""
    for mark in panel[panel.start_kept & ~panel.baseline & drawable(panel.value, scene.log)].itertuples():
        color, marker = scene.look(mark.series)
        ax.plot([scene.place(mark)], [mark.value], marker, ms=scene.marker_size, mfc="white", mec=color, zorder=4)


def value_labels(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """Draw the value above each interval, if the scene has room for value labels."""
    for mark in panel[~panel.baseline & drawable(panel.value, scene.log)].itertuples() if scene.labelled else ():
        top = np.nanmax([mark.value, mark.high])
        text = significant(mark.value, 3)
        ax.annotate(
            text,
            (scene.place(mark), top),
            (0, 2.5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=6.8,
            gid=VALUE,
        )


def interval(part: pd.DataFrame) -> np.ndarray:
    """Compute lengths of the error bars below and above, (2, n)."""
    return np.nan_to_num(np.stack([part.value - part.low, part.high - part.value]))


def draw_dots(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """Draw dots: series offset at each x, a marker per cell with its interval."""
    prepare(ax, panel, scene)
    for series, part in panel[~panel.baseline & drawable(panel.value, scene.log)].groupby("series", sort=False):
        color, marker = scene.look(series)
        places = [scene.place(mark) for mark in part.itertuples()]
        ax.errorbar(
            places, part.value, interval(part), fmt=marker, ms=scene.marker_size, color=color, elinewidth=1.1, zorder=3
        )
    hollow_marks(ax, panel, scene)
    edge_marks(ax, panel, scene)
    value_labels(ax, panel, scene)


def draw_bars(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """Draw bars: series offset at each x; bars start at zero or, on a log axis, at the baseline
    (their length is then a ratio)."""
    prepare(ax, panel, scene)
    baseline = panel.value[panel.baseline & drawable(panel.value, scene.log)]
    bottom = (baseline.iloc[0] if len(baseline) else scene.limits[panel.panel.iloc[0]][0]) if scene.log else 0.0
    for series, part in panel[~panel.baseline & drawable(panel.value, scene.log)].groupby("series", sort=False):
        places = [scene.place(mark) for mark in part.itertuples()]
        width = SPREAD["bars"] / len(scene.series) * 0.92
        color = scene.look(series)[0]
        looks = [("white", color) if kept else (color, "none") for kept in part.start_kept]
        ax.bar(
            places,
            part.value - bottom,
            width,
            bottom,
            color=[look[0] for look in looks],
            edgecolor=[look[1] for look in looks],
            zorder=2,
        )
        ax.errorbar(places, part.value, interval(part), fmt="none", ecolor=INK, elinewidth=0.9, zorder=3)
    edge_marks(ax, panel, scene)
    value_labels(ax, panel, scene)


def draw_lines(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """Draw one line per series over the x values in their order, with gaps for failed or missing
    cells."""
    prepare(ax, panel, scene)
    xs = scene.xs[panel.panel.iloc[0]]
    for series, part in panel[~panel.baseline].groupby("series", sort=False):
        color, marker = scene.look(series)
        shown = part[drawable(part.value, scene.log)].set_index("x").reindex(xs)
        shift = scene.place(part.iloc[0]) - xs.index(part.iloc[0].x)
        places = np.arange(len(xs)) + shift
        ax.errorbar(
            places,
            shown.value,
            interval(shown),
            fmt=marker + "-",
            ms=scene.marker_size,
            color=color,
            elinewidth=1.1,
            zorder=3,
        )
    hollow_marks(ax, panel, scene)
    edge_marks(ax, panel, scene)
