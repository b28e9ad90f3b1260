"""Scene of a figure: properties common to all its panels, such as labels in order, limits of the
axes, colours, markers and legend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.colors import LogNorm, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..data.records import FULL_PRECISION
from ..data.starts import WORDS
from ..style import INK, MARKERS, PALETTE

# share of the distance between two x over which series are spread
SPREAD = {"dots": 0.7, "bars": 0.8, "lines": 0.12}
LABELLED_DOTS = 12  # with more dots than this, none gets a value label
CROWD = 44  # with more markers than this across the width, they are smaller


@dataclass(frozen=True)
class Scene:
    """Properties common to all panels: kind, log scale, x and series labels in order, the names of
    the axes, the notes, and the number of columns. Specific to a panel are the x labels (those of
    its facet alone), limits and colours (those of its model)."""

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
        """Build the scene of all ``marks`` under a spec's ``figure``; ``names`` are those of the
        series and of the value."""
        shown = marks[~marks.baseline] if (~marks.baseline).any() else marks
        log, kind = figure.get("scale") == "log", figure["kind"]
        apart = marks.groupby("panel").model.nunique().max() == 1  # panels with one model each
        facets = [part for _, part in shown.groupby(figure["facet"])] if figure.get("facet") else [shown]
        groups = [(part, list(part.panel.unique())) for _, part in (marks.groupby("model") if apart else [("", marks)])]
        return cls(
            kind=kind,
            log=log,
            xs={
                panel: list(part.sort_values("x_position").x.unique())
                for part in facets
                for panel in part.panel.unique()
            },
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
        """Return (colour, marker) of a series; the first 70 all differ in at least one."""
        position = self.series.index(series)
        return PALETTE[position % len(PALETTE)], MARKERS[position % len(MARKERS)]

    @property
    def marker_size(self) -> float:
        """Return the marker size in points: smaller if many markers share the width."""
        return 5.0 if max(map(len, self.xs.values())) * len(self.series) * self.columns <= CROWD else 3.8

    def place(self, mark: Any) -> float:
        """Compute the x coordinate of a mark: that of its label plus the offset of its series."""
        shift = ((self.series.index(mark.series) + 0.5) / len(self.series) - 0.5) * SPREAD[self.kind]
        return self.xs[mark.panel].index(mark.x) + shift

    def legend(self) -> list[Artist]:
        """Build the legend entries: named series, cells that kept the start of a training, and the
        baseline."""
        handles: list[Artist] = []
        for series in self.series if any(self.series) and self.kind != "heatmap" else []:
            color, marker = self.look(series)
            line = "-" if self.kind == "lines" else ""
            text = clip(series, 44)
            handles.append(
                Patch(color=color, label=text)
                if self.kind == "bars"
                else Line2D([], [], ls=line, color=color, marker=marker, label=text)
            )
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
    """Build the colour scale of a heat map: from the smallest to the largest value of quantized
    cells."""
    shown = marks[~marks.baseline] if (~marks.baseline).any() else marks
    values = shown.value[drawable(shown.value, log)]
    span = (values.min(), values.max()) if len(values) else (1.0, 10.0)
    return LogNorm(*span) if log else Normalize(*span)


def limits_of(marks: pd.DataFrame, log: bool, from_zero: bool) -> tuple[float, float]:
    """Compute limits of the value axis that contain all values, intervals and baselines, with room
    above for crosses and labels."""
    numbers = pd.concat([marks.value, marks.low, marks.high])
    numbers = numbers[drawable(numbers, log)].to_numpy()
    if not len(numbers):
        return (1.0, 10.0)
    numbers = np.log10(numbers) if log else np.append(numbers, 0.0) if from_zero else numbers
    low, high = numbers.min(), numbers.max()
    room = (high - low) or (0.1 if log else abs(high) or 1.0)
    low, high = (
        low - (0.06 * room if log or not from_zero or low < 0 else 0.0),
        high + (0.16 if from_zero else 0.10) * room,
    )
    return (10.0**low, 10.0**high) if log else (low, high)


def clip(text: str, length: int) -> str:
    """Shorten ``text`` in its middle to ``length`` characters, because names differ at either
    end."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[len(text) - (length - length // 2 - 1) :]}"
