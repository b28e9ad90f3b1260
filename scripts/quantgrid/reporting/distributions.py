"""What transforms make of the inputs and weights of every site: the descriptions that ``describe_transform`` leaves, as tables and figures.

Heat maps, channel by layer, of the largest magnitude of each channel, one panel per transform and one figure per site; kurtosis over layers,
one row of panels per site and one line per transform. Colours and axes are shared, so that panels compare.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..errors import ConfigError
from ..storage import read_json
from .figures import LEGEND_CHARACTERS, SETTINGS
from .panels import clip, scale_ticks
from .style import INK, MUTED, PALETTE, WIDTH, significant, value_label

COLORS = "viridis"  # readable without colour vision, and darker the smaller: outliers light up
FAINTEST = 1.0  # percentile of the channels, below which all share the darkest colour
NORMAL = 3.0  # kurtosis of a normal distribution
MEASURES = {"kurtosis": "all values", "row_kurtosis": {"inputs": "within a token", "weights": "within an output channel"}}
MAGNITUDE = {"inputs": "largest |x| of the channel\n(units of the model, kept tokens)",
             "weights": "largest |W| of the input channel\n(units of the model)"}
RUNS = "A wide layer shows the largest of every run of neighbouring channels. All panels share the colours."
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))


@dataclass(frozen=True)
class Description:
    """One transform of one model: its label, and its measures or the reason why there are none."""

    label: str
    content: dict[str, Any]
    reason: str = ""

    def maxima(self, tensor: str, site: str) -> np.ndarray:
        """Largest magnitudes (layers, bins)."""
        return np.array(self.content[tensor][site]["maximum"])


def read(paths: Sequence[str | Path]) -> list[Description]:
    """The descriptions at ``paths`` in their order; a transform that was fitted to a scheme says to which."""
    found = []
    for path in paths:
        content = read_json(path)
        if content.get("status") != "failed" and not {"inputs", "weights", "sites"} <= content.keys():
            raise ConfigError(f"{path}: not a description of a transform; delete it and run again")
        axes = content["axes"]
        target = f" ({axes['target']})" if axes["target"] != "any" else ""
        found.append(Description(value_label("transform", axes["transform"]) + target, content, content.get("reason", "")))
    return found


def caption(name: str) -> str:
    """What the figure called ``name`` shows, for the report."""
    first, _, second = name.partition("-")
    what = {"inputs": "the inputs", "weights": "the weights"}
    if first == "kurtosis":
        return (f"Kurtosis (3 of a normal distribution) of {what[second]} before rounding. Left all values of a layer as one population, right "
                f"the median of the kurtoses {MEASURES['row_kurtosis'][second]}. Black: no transform.")
    return f"Largest magnitude per channel and layer of {what[first]} of {second}, before rounding, in the model's own units. {RUNS}"


def build(name: str, descriptions: Sequence[Description]) -> tuple[Figure, pd.DataFrame]:
    """The figure called ``name`` (one of ``shown_transforms.FIGURES``) and its numbers."""
    first, _, second = name.partition("-")
    if first == "kurtosis":
        return plot_kurtosis(descriptions, second), shape_table(descriptions, second)
    return plot_maxima(descriptions, first, second), maxima_table(descriptions, first, second)


def shape_table(descriptions: Sequence[Description], tensor: str) -> pd.DataFrame:
    """A row per transform, site and layer: both kurtoses and the largest channel maximum over the median one; one empty row for a failed one."""
    frames = []
    for described in descriptions:
        for site, found in described.content.get(tensor, {"": {}}).items():
            numbers = {measure: found.get(measure, [np.nan]) for measure in (*MEASURES, "peak_to_median")}
            layers = range(len(numbers["kurtosis"])) if found else [pd.NA]
            frames.append(pd.DataFrame({"transform": described.label, "site": site, "layer": pd.array(layers, "Int64"), **numbers}))
    return pd.concat(frames, ignore_index=True)


def maxima_table(descriptions: Sequence[Description], tensor: str, site: str) -> pd.DataFrame:
    """A row per transform and layer, a column per run of channels, named by its first: the largest magnitude in it."""
    frames = []
    for described in (described for described in descriptions if not described.reason):
        maxima, step = described.maxima(tensor, site), described.content["sites"][site]["channels_per_bin"]
        table = pd.DataFrame(maxima, columns=[str(position * step) for position in range(maxima.shape[1])])
        frames.append(pd.concat([pd.DataFrame({"transform": described.label, "layer": range(len(maxima))}), table], axis=1))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["transform", "layer"])


def plot_maxima(descriptions: Sequence[Description], tensor: str, site: str) -> Figure:
    """Heat maps, two in a row, with one logarithmic colour bar."""
    values = {described.label: described.maxima(tensor, site) for described in descriptions if not described.reason}
    norm = color_norm(list(values.values()))
    height, width = -(-len(descriptions) // 2), min(len(descriptions), 2)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, 0.6 + 1.45 * height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(height, width, squeeze=False, sharex=True, sharey=True).flat)
        for position, (ax, described) in enumerate(zip(axes, descriptions)):
            ax.set_title(clip(described.label, 34))
            if described.reason:
                say_failed(ax, described)
            else:
                draw_map(ax, values[described.label], described.content["sites"][site], norm)
            below = position + width >= len(descriptions)
            ax.set_xlabel("channel" if below else "")
            ax.tick_params(labelbottom=below)
            ax.set_ylabel("layer" if position % width == 0 else "")
        for ax in axes[len(descriptions) :]:
            ax.set_axis_off()
        bar = figure.colorbar(ScalarMappable(norm, COLORS), ax=axes, label=MAGNITUDE[tensor], aspect=40, pad=0.01, extend="min")
        bar.outline.set_visible(False)
        scale_ticks(bar.ax, True, norm.vmin, norm.vmax)
    return figure


def color_norm(values: Sequence[np.ndarray]) -> LogNorm:
    """A logarithmic scale from a low percentile of all positive values to the largest."""
    positive = np.concatenate([part[part > 0] for part in values]) if values else np.array([])
    if not len(positive):
        return LogNorm(1.0, 10.0)
    low, high = np.percentile(positive, FAINTEST), positive.max()
    return LogNorm(min(low, high / 1.01), high)


def draw_map(ax: Axes, values: np.ndarray, site: dict[str, int], norm: LogNorm) -> None:
    """One transform: channels across, layers upwards, and how far its largest channel stands out of its layer."""
    layers, bins = values.shape
    extent = (0, bins * site["channels_per_bin"], -0.5, layers - 0.5)
    ax.imshow(np.maximum(values, norm.vmin), COLORS, norm, aspect="auto", interpolation="none", origin="lower", extent=extent)
    ax.set_xlim(0, site["channels"])
    ax.spines[:].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.set_title(f"largest {significant(values.max())}", loc="right", fontweight="normal", fontsize=7.5, color=MUTED)


def say_failed(ax: Axes, described: Description) -> None:
    ax.text(0.5, 0.5, textwrap.fill(f"× failed: {described.reason}", 50), ha="center", va="center", transform=ax.transAxes, fontsize=7)


def plot_kurtosis(descriptions: Sequence[Description], tensor: str) -> Figure:
    """A row of panels per site, a column per measure, on one logarithmic axis per column; the unchanged model is the black line."""
    drawn = [described for described in descriptions if not described.reason]
    sites = list(drawn[0].content["sites"]) if drawn else [""]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, 0.7 + 1.45 * len(sites)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(sites), len(MEASURES), squeeze=False, sharex=True, sharey="col")
        for row, site in zip(axes, sites):
            for ax, measure in zip(row, MEASURES):
                draw_lines(ax, [(described.content[tensor][site][measure], look(number)) for number, described in enumerate(drawn)])
                named = MEASURES[measure] if measure == "kurtosis" else MEASURES[measure][tensor]
                ax.set_title(f"{site}, {named}")
            row[0].set_ylabel("kurtosis")
        for ax in axes[-1]:
            ax.set_xlabel("layer")
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        draw_legend(figure, drawn, [described.label for described in descriptions if described.reason])
    return figure


def look(number: int) -> dict[str, Any]:
    """The line of a transform: the first, which is the unchanged model, in black; no two of the next 18 alike."""
    if number == 0:
        return {"color": INK, "linewidth": 1.6, "linestyle": "-", "zorder": 3}
    hues = PALETTE[:-1]
    return {"color": hues[(number - 1) % len(hues)], "linewidth": 1.2, "linestyle": DASHES[(number - 1) // len(hues) % len(DASHES)]}


def draw_lines(ax: Axes, lines: Sequence[tuple[Sequence[float | None], dict[str, Any]]]) -> None:
    ax.set_yscale("log")
    ax.grid(axis="y")
    ax.axhline(NORMAL, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    for values, style in lines:
        ax.plot(np.array(values, dtype=float), marker="o" if len(values) < 4 else "", markersize=3, **style)
    low, high = ax.get_ylim()
    scale_ticks(ax, True, low, high)


def draw_legend(figure: Figure, drawn: Sequence[Description], failed: Sequence[str]) -> None:
    """Above the panels: the transforms, the normal distribution, and which transforms failed."""
    handles = [Line2D([], [], label=clip(described.label, 40), **look(number)) for number, described in enumerate(drawn)]
    handles.append(Line2D([], [], color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), label="normal distribution"))
    handles += [Line2D([], [], linestyle="", marker="x", color=INK, label=f"{clip(name, 40)}: failed") for name in failed]
    longest = max(len(str(handle.get_label())) + 8 for handle in handles)
    figure.legend(handles=handles, loc="outside upper left", ncols=max(1, min(len(handles), LEGEND_CHARACTERS // longest)))
