"""The figure of ``growth.py``: what every job takes beyond its offset, in seconds of a processor
and in memory, a row of panels for each axis.

Both scales are logarithmic, so that a power is a straight line and its exponent the slope. A
measurement that is hardly above the offset says nothing of the growth: it is left out of the
picture, and is in the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from growth_fit import NEGLIGIBLE, Fit
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from quantgrid.reporting.figures.panels import scale_ticks, tick_text
from quantgrid.reporting.figures.study_figures import SETTINGS
from quantgrid.reporting.style import GRID, MARKERS, MUTED, PALETTE, WIDTH

PANEL = 1.75  # inches that a panel is high
Found = Mapping[tuple[str, str, str], Fit]  # by axis, job and quantity
NOTE = (
    "Measured (marks) and fitted (lines: offset + growth × size^exponent), both less the offset: start-up, and what "
    "does not lie on the axis.\n"
    "Next to each name: the fitted exponent ± its standard error, in brackets that of the algorithm's own cost. "
    "Measurements less than "
    f"{NEGLIGIBLE:.0%} above\nthe offset are not shown."
)


def plot(
    measured: Sequence[Mapping[str, Any]],
    fits: Found,
    own: Mapping[tuple[str, str, str], float],
    quantities: Mapping[str, str],
) -> Figure:
    """``measured`` are rows with ``axis``, ``size``, ``job`` and one column for each of
    ``quantities`` (column -> name with its unit)."""
    axes_names, jobs = ([*dict.fromkeys(key[place] for key in fits)] for place in (0, 1))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, PANEL * len(axes_names) + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(axes_names), len(quantities), squeeze=False)
        for row, axis in enumerate(axes_names):
            for ax, (quantity, name) in zip(panels[row], quantities.items()):
                shown = {
                    job: [
                        (each["size"], each[quantity])
                        for each in measured
                        if each["axis"] == axis and each["job"] == job
                    ]
                    for job in jobs
                    if (axis, job, quantity) in fits
                }
                for job, points in shown.items():
                    look = {"color": PALETTE[jobs.index(job)], "marker": MARKERS[jobs.index(job)]}
                    draw(ax, points, fits[axis, job, quantity], f"{job}: ", own[axis, job, quantity], look)
                finish(ax, sorted({size for points in shown.values() for size, _ in points}), axis, name)
        figure.supxlabel(NOTE, x=0.01, ha="left", fontsize=6.8, color=MUTED)
    return figure


def draw(
    ax: Axes, points: Sequence[tuple[float, float]], found: Fit, label: str, own: float, look: Mapping[str, str]
) -> None:
    """One series: what was measured (size, value) above the offset, and the power that was fitted,
    over the sizes that are shown."""
    above = [(size, value - found.offset) for size, value in points if value - found.offset > NEGLIGIBLE * value]
    if found.flat or not above:
        ax.plot([], [], linestyle="", label=f"{label}no growth ({own:g})", **look)
        return
    sizes = np.array([min(size for size, _ in above), found.largest])
    ax.plot(sizes, found(sizes) - found.offset, color=look["color"])
    ax.plot(*zip(*above), linestyle="", label=f"{label}{found.exponent:.2f} ± {found.error:.2f} ({own:g})", **look)


def finish(ax: Axes, sizes: Sequence[float], axis: str, quantity: str) -> None:
    ax.set(xscale="log", yscale="log", xlabel=axis, ylabel=f"{quantity}\nbeyond the offset")
    ax.xaxis.set_major_locator(FixedLocator(sizes))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(tick_text))
    low, high = ax.get_ylim()
    ax.set_ylim(
        low, high * (high / low) ** (0.1 + 0.17 * len(ax.get_legend_handles_labels()[0]))
    )  # room for the lines of the legend
    scale_ticks(ax, True, *ax.get_ylim())
    ax.grid(color=GRID)
    ax.legend(
        loc="upper left",
        fontsize=6.8,
        handletextpad=0.2,
        borderaxespad=0.2,
        labelspacing=0.3,
        frameon=True,
        edgecolor="none",
        framealpha=1,
    )
