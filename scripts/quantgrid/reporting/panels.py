"""How one panel of a figure is drawn, per kind: dots, bars, lines (heat maps: ``heatmap.py``).

Every ``draw_`` function takes the matplotlib axes, the panel's marks (rows of ``figures.points``) and the :class:`Scene` of the whole figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .records import FULL_PRECISION
from .starts import WORDS
from .style import INK, MARKERS, PALETTE, significant, superscript

SPREAD = {"dots": 0.7, "bars": 0.8, "lines": 0.12}  # of the distance between two x positions, over which the series stand side by side
LABELLED_DOTS = 12  # more dots than these go without a value beside each
TICK = 27  # characters of a tick label
CROWD = 44  # more markers than these beside each other are drawn smaller
VALUE, BASELINE = "value", "baseline"  # the gids of value labels, which labels.py fits or drops, and of what they must not hide


@dataclass(frozen=True)
class Scene:
    """What the panels share: kind, log scale, x and series labels in order, the names of the axes, what there is to explain, and in how many
    columns the panels stand. By panel are the x labels (those of its facet alone), limits and colours (those of its model)."""

    kind: str
    log: bool
    xs: dict[str, list[str]]
    series: list[str]
    limits: dict[str, tuple[float, float]]
    norms: dict[str, Normalize]
    x_name: str
    series_name: str
    value_name: str
    baseline: bool
    start_kept: bool
    labelled: bool
    columns: int

    @classmethod
    def of(cls, marks: pd.DataFrame, figure: Mapping[str, Any], names: tuple[str, str], columns: int) -> Scene:
        """The scene of all ``marks`` under a spec's ``figure``; ``names`` are those of the series and of the value."""
        shown = marks[~marks.baseline] if (~marks.baseline).any() else marks
        log, kind = figure.get("scale") == "log", figure["kind"]
        apart = marks.groupby("panel").model.nunique().max() == 1  # panels of one model each
        facets = [part for _, part in shown.groupby(figure["facet"])] if figure.get("facet") else [shown]
        groups = [(part, list(part.panel.unique())) for _, part in (marks.groupby("model") if apart else [("", marks)])]
        return cls(
            kind=kind,
            log=log,
            xs={panel: list(part.sort_values("x_position").x.unique()) for part in facets for panel in part.panel.unique()},
            series=list(shown.sort_values("series_position").series.unique()),
            limits={panel: limits_of(part, log, kind == "bars") for part, panels in groups for panel in panels},
            norms={panel: norm_of(part, log) for part, panels in groups for panel in panels},
            x_name=figure["x"],
            series_name=names[0],
            value_name=names[1],
            baseline=bool(drawable(marks.value[marks.baseline], log).any()),
            start_kept=bool(shown.start_kept.any()),
            labelled=kind == "bars" or (kind == "dots" and len(shown) <= LABELLED_DOTS),
            columns=columns,
        )

    def look(self, series: str) -> tuple[str, str]:
        """(colour, marker) of a series: no two of the first 70 share both."""
        position = self.series.index(series)
        return PALETTE[position % len(PALETTE)], MARKERS[position % len(MARKERS)]

    @property
    def marker_size(self) -> float:
        """In points: smaller where many markers share the width."""
        return 5.0 if max(map(len, self.xs.values())) * len(self.series) * self.columns <= CROWD else 3.8

    def place(self, mark: Any) -> float:
        """The x coordinate of a mark: that of its label, and beside it the series' own place."""
        shift = ((self.series.index(mark.series) + 0.5) / len(self.series) - 0.5) * SPREAD[self.kind]
        return self.xs[mark.panel].index(mark.x) + shift

    def legend(self) -> list[Artist]:
        """Legend entries: the series, if they have names, cells that kept the start of a training, and the baseline."""
        handles: list[Artist] = []
        for series in self.series if any(self.series) and self.kind != "heatmap" else []:
            color, marker = self.look(series)
            line = "-" if self.kind == "lines" else ""
            text = clip(series, 44)
            handles.append(Patch(color=color, label=text) if self.kind == "bars" else Line2D([], [], ls=line, color=color, marker=marker, label=text))
        if self.start_kept and self.kind == "bars":
            handles.append(Patch(facecolor="white", edgecolor=INK, label=WORDS))
        elif self.start_kept and self.kind != "heatmap":
            handles.append(Line2D([], [], ls="", color=INK, marker=MARKERS[0], mfc="white", label=WORDS))
        if self.baseline and self.kind != "heatmap":
            handles.append(Line2D([], [], color=INK, lw=0.9, ls=(0, (4, 2)), label=FULL_PRECISION))
        return handles


def drawable(values: pd.Series, log: bool) -> pd.Series:
    return np.isfinite(values) & (values.gt(0) | (not log))


def norm_of(marks: pd.DataFrame, log: bool) -> Normalize:
    """The colours of a heat map: from the smallest to the largest value of quantized cells."""
    shown = marks[~marks.baseline] if (~marks.baseline).any() else marks
    values = shown.value[drawable(shown.value, log)]
    span = (values.min(), values.max()) if len(values) else (1.0, 10.0)
    return LogNorm(*span) if log else Normalize(*span)


def limits_of(marks: pd.DataFrame, log: bool, from_zero: bool) -> tuple[float, float]:
    """Limits of the value axis that hold all values, intervals and baselines, with room above for crosses and labels."""
    numbers = pd.concat([marks.value, marks.low, marks.high])
    numbers = numbers[drawable(numbers, log)].to_numpy()
    if not len(numbers):
        return (1.0, 10.0)
    numbers = np.log10(numbers) if log else np.append(numbers, 0.0) if from_zero else numbers
    low, high = numbers.min(), numbers.max()
    room = (high - low) or (0.1 if log else abs(high) or 1.0)
    low, high = low - (0.06 * room if log or not from_zero or low < 0 else 0.0), high + (0.16 if from_zero else 0.10) * room
    return (10.0**low, 10.0**high) if log else (low, high)


def clip(text: str, length: int) -> str:
    """``text`` cut in its middle to ``length`` characters, since names differ at either end."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[len(text) - (length - length // 2 - 1) :]}"


def prepare(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """Axes, grid, ticks and the baseline with its value at the right edge."""
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
        ax.annotate(significant(value, 4), (1, value), (2, 0), ax.get_yaxis_transform(), "offset points", va="center", fontsize=6.8, color=INK)


def scale_ticks(ax: Axes, log: bool, low: float, high: float) -> None:
    """Plain numbers on the value axis; on a log axis 1-2-5 or, within less than a decade, evenly spaced values."""
    if log:
        ticks = [tick for tick in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= tick <= high]
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
    """Crosses at the top edge for failed cells, triangles at the bottom edge for values that a log axis cannot show."""
    for mark in panel[~panel.baseline].itertuples():
        failed = mark.status != "ok"
        if failed or (scene.log and mark.value <= 0):
            place, color = scene.place(mark), scene.look(mark.series)[0]
            edge = ax.get_xaxis_transform()
            ax.plot([place], [1.0 if failed else 0.0], "x" if failed else "v", color=color, transform=edge, clip_on=False, ms=5.5, mew=1.6, zorder=5)


def hollow_marks(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """Empty the markers of cells of which a training kept its start."""
    for mark in panel[panel.start_kept & ~panel.baseline & drawable(panel.value, scene.log)].itertuples():
        color, marker = scene.look(mark.series)
        ax.plot([scene.place(mark)], [mark.value], marker, ms=scene.marker_size, mfc="white", mec=color, zorder=4)


def value_labels(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """The value above each interval, where the scene has room for that at all."""
    for mark in panel[~panel.baseline & drawable(panel.value, scene.log)].itertuples() if scene.labelled else ():
        top = np.nanmax([mark.value, mark.high])
        text = significant(mark.value, 3)
        ax.annotate(text, (scene.place(mark), top), (0, 2.5), textcoords="offset points", ha="center", va="bottom", fontsize=6.8, gid=VALUE)


def interval(part: pd.DataFrame) -> np.ndarray:
    """Lengths of the error bars below and above, (2, n)."""
    return np.nan_to_num(np.stack([part.value - part.low, part.high - part.value]))


def draw_dots(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """Series side by side at each x, a marker per cell with its interval."""
    prepare(ax, panel, scene)
    for series, part in panel[~panel.baseline & drawable(panel.value, scene.log)].groupby("series", sort=False):
        color, marker = scene.look(series)
        places = [scene.place(mark) for mark in part.itertuples()]
        ax.errorbar(places, part.value, interval(part), fmt=marker, ms=scene.marker_size, color=color, elinewidth=1.1, zorder=3)
    hollow_marks(ax, panel, scene)
    edge_marks(ax, panel, scene)
    value_labels(ax, panel, scene)


def draw_bars(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """Series side by side at each x; bars stand on zero or, on a log axis, on the baseline (their length is then a ratio)."""
    prepare(ax, panel, scene)
    baseline = panel.value[panel.baseline & drawable(panel.value, scene.log)]
    bottom = (baseline.iloc[0] if len(baseline) else scene.limits[panel.panel.iloc[0]][0]) if scene.log else 0.0
    for series, part in panel[~panel.baseline & drawable(panel.value, scene.log)].groupby("series", sort=False):
        places = [scene.place(mark) for mark in part.itertuples()]
        width = SPREAD["bars"] / len(scene.series) * 0.92
        color = scene.look(series)[0]
        looks = [("white", color) if kept else (color, "none") for kept in part.start_kept]
        ax.bar(places, part.value - bottom, width, bottom, color=[look[0] for look in looks], edgecolor=[look[1] for look in looks], zorder=2)
        ax.errorbar(places, part.value, interval(part), fmt="none", ecolor=INK, elinewidth=0.9, zorder=3)
    edge_marks(ax, panel, scene)
    value_labels(ax, panel, scene)


def draw_lines(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """One line per series over the x values in their order, broken where a cell failed or is missing."""
    prepare(ax, panel, scene)
    xs = scene.xs[panel.panel.iloc[0]]
    for series, part in panel[~panel.baseline].groupby("series", sort=False):
        color, marker = scene.look(series)
        shown = part[drawable(part.value, scene.log)].set_index("x").reindex(xs)
        shift = scene.place(part.iloc[0]) - xs.index(part.iloc[0].x)
        places = np.arange(len(xs)) + shift
        ax.errorbar(places, shown.value, interval(shown), fmt=marker + "-", ms=scene.marker_size, color=color, elinewidth=1.1, zorder=3)
    hollow_marks(ax, panel, scene)
    edge_marks(ax, panel, scene)
