"""Heat-map panels and their colour bars."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from ..data.records import FULL_PRECISION
from ..data.starts import MARK
from ..style import EMPTY, HEATMAP, INK, MUTED, significant
from .panels import TICK, VALUE, scale_ticks
from .scene import Scene, clip

# range of the colour map in use: its lightest colour differs from white, its darkest carries text
SHADES = (0.08, 0.85)


def draw_heatmap(ax: Axes, panel: pd.DataFrame, scene: Scene) -> None:
    """Draw x across, series down, the value as colour and as text; failed cells are crossed,
    missing ones empty."""
    xs = scene.xs[panel.panel.iloc[0]]
    cells = {(scene.series.index(mark.series), xs.index(mark.x)): mark for mark in panel[~panel.baseline].itertuples()}
    grid = np.full((len(scene.series), len(xs)), np.nan)
    for place, mark in cells.items():
        grid[place] = np.nan if scene.log and mark.value <= 0 else mark.value
    shades, colors = shade(scene.norms[panel.panel.iloc[0]], grid), colormaps[HEATMAP]
    edges = (np.arange(size + 1) - 0.5 for size in grid.T.shape)
    ax.set_facecolor(EMPTY)
    ax.pcolormesh(*edges, shades, cmap=colors, vmin=0, vmax=1, edgecolors="white", linewidth=1.2)
    for row, column in np.ndindex(grid.shape):
        mark = cells.get((row, column))
        text = "–" if mark is None else "× failed" if mark.status != "ok" else with_margin(mark)
        dark = np.dot(colors(shades[row, column])[:3], (0.299, 0.587, 0.114)) < 0.5 and np.isfinite(grid[row, column])
        ax.text(column, row, text, ha="center", va="center", fontsize=7.5, color="white" if dark else INK, gid=VALUE)
    ax.set_xticks(range(len(xs)), [clip(text, TICK) for text in xs])
    ax.set_yticks(range(len(scene.series)), [clip(text, TICK) for text in scene.series])
    ax.set_ylim(len(scene.series) - 0.5, -0.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for value in panel.value[panel.baseline & panel.value.notna()]:
        ax.set_title(
            f"{FULL_PRECISION} {significant(value, 4)}", loc="right", fontweight="normal", fontsize=7.5, color=MUTED
        )


def with_margin(mark: Any) -> str:
    """Format a value, marked if a training of the cell kept its start, with half of its 95 %
    interval below."""
    margin = (mark.high - mark.low) / 2
    return (
        significant(mark.value, 3)
        + (f" {MARK}" if mark.start_kept else "")
        + (f"\n± {significant(margin, 2)}" if margin > 0 else "")
    )


def shade(norm: Normalize, values: Any) -> Any:
    """Map values to positions within ``SHADES`` on the colour map; NaN stays NaN."""
    share = np.ma.filled(norm(np.ma.masked_invalid(values)).astype(float), np.nan)
    return SHADES[0] + (SHADES[1] - SHADES[0]) * share


def draw_colorbars(figure: Figure, axes: list[Axes], scene: Scene) -> None:
    """Draw the colour bars over the range in use: one bar if all panels share it, else one per
    panel."""
    colors = LinearSegmentedColormap.from_list("shown", colormaps[HEATMAP](np.linspace(*SHADES, 256)))
    norms = list(scene.norms.values())
    for norm, near in [(norms[0], axes)] if len(set(norms)) == 1 else zip(norms, axes):
        label = scene.value_name if near in (axes, axes[-1]) else ""
        bar = figure.colorbar(ScalarMappable(norm, colors), ax=near, label=label, aspect=30, pad=0.01)
        bar.outline.set_visible(False)
        scale_ticks(bar.ax, scene.log, norm.vmin, norm.vmax)
