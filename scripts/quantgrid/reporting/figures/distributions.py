"""Figures of the inputs and weights of every site under each transform, from the outputs of
``measure_distributions``.

Heat maps, channel by layer, of the largest magnitude of each channel: one panel per transform, one
figure per site, and one colour scale per figure. Kurtosis, and the distance from the best transform of
blocks, over layers: one row of panels per site and one line per transform.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
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

from ...models.plans import SITES
from ..data.descriptions import Description, excess_table, maxima_table, shape_table
from ..style import INK, MUTED, PALETTE, WIDTH, significant
from .panels import scale_ticks
from .scene import clip
from .study_figures import LEGEND_CHARACTERS, SETTINGS

# Readable without colour vision; smaller values are darker, so outliers stand out. More shades
# would not be distinguishable and would double the bytes.
COLORS = matplotlib.colormaps["viridis"].resampled(64)
FAINTEST = 1.0  # percentile of the channels; all below it share the darkest colour
NORMAL = (3.0, "normal distribution")  # kurtosis
BOUND = (1.0, "lower bound")
WITHIN = {"inputs": "within a token", "weights": "within an output channel"}
MAGNITUDE = {
    "inputs": "largest |x| of the channel\n(units of the model, kept tokens)",
    "weights": "largest |W| of the input channel\n(units of the model)",
}
EVENNESS = (
    "A transform may change the scale as a whole; what counts is how even a layer is. Peak/median: the largest "
    "channel over the median one, "
    "the median of the layers. Of a wide site each run of neighbouring channels shows its largest."
)
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))


def caption(name: str) -> str:
    """Return the caption of the figure ``name`` for the report."""
    first, _, second = name.partition("-")
    if first == "trace":
        return (
            "Traces of the second moments of inputs and weights, multiplied and summed over the blocks of a site, over "
            "the least sum of any transform inside the blocks (arXiv 2512.00956): where errors of rounding are "
            "proportional to the traces, the factor by which the output error exceeds the least one. A rotation "
            "inside the blocks changes no trace, a map across blocks the bound too. Black: no transform."
        )
    what = {"inputs": "the inputs", "weights": "the weights"}
    if first == "kurtosis":
        return (
            f"Kurtosis (3 of a normal distribution) of {what[second]} before rounding. Left all values of a layer "
            "as one population, right "
            f"the median of the kurtoses {WITHIN[second]}. Black: no transform."
        )
    return (
        f"Largest magnitude per channel and layer of {what[first]} of {second}, before rounding, "
        f"in the model's own units. {EVENNESS}"
    )


def build(name: str, descriptions: Sequence[Description]) -> tuple[Figure, pd.DataFrame]:
    """Build the figure ``name`` (one of ``shown_transforms.FIGURES``) and its numbers."""
    first, _, second = name.partition("-")
    if first == "trace":
        measures = {f"blocks of {block}": ("trace_excess", f"trace_excess_{block}") for block in (16, 32)}
        return plot_layers(descriptions, measures, "over the bound", BOUND), excess_table(descriptions)
    if first == "kurtosis":
        measures = {"all values": (second, "kurtosis"), WITHIN[second]: (second, "row_kurtosis")}
        return plot_layers(descriptions, measures, "kurtosis", NORMAL), shape_table(descriptions, second)
    return plot_maxima(descriptions, first, second), maxima_table(descriptions, first, second)


def plot_maxima(descriptions: Sequence[Description], tensor: str, site: str) -> Figure:
    """Plot heat maps, two in a row, with one logarithmic colour bar."""
    values = {described.label: described.maxima(tensor, site) for described in descriptions if not described.reason}
    norm = color_norm(list(values.values()))
    height, width = -(-len(descriptions) // 2), min(len(descriptions), 2)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, 0.6 + 1.45 * height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(height, width, squeeze=False, sharex=True, sharey=True).flat)
        for position, (ax, described) in enumerate(zip(axes, descriptions)):
            ax.set_title(clip(described.label, 25), fontsize=7.5)
            if described.reason:
                say_failed(ax, described)
            else:
                draw_map(ax, values[described.label], described.content["sites"][site], norm)
                ax.set_title(
                    evenness(described.content[tensor][site]["peak_to_median"]),
                    loc="right",
                    fontweight="normal",
                    fontsize=6.8,
                    color=MUTED,
                )
            below = position + width >= len(descriptions)
            ax.set_xlabel("channel" if below else "")
            ax.tick_params(labelbottom=below)
            ax.set_ylabel("layer" if position % width == 0 else "")
        for ax in axes[len(descriptions) :]:
            ax.set_axis_off()
        bar = figure.colorbar(
            ScalarMappable(norm, COLORS), ax=axes, label=MAGNITUDE[tensor], aspect=40, pad=0.01, extend="min"
        )
        bar.outline.set_visible(False)
        scale_ticks(bar.ax, True, norm.vmin, norm.vmax)
    return figure


def color_norm(values: Sequence[np.ndarray]) -> LogNorm:
    """Build a logarithmic scale from a low percentile of all positive values to the largest."""
    positive = np.concatenate([part[part > 0] for part in values]) if values else np.array([])
    if not len(positive):
        return LogNorm(1.0, 10.0)
    low, high = np.percentile(positive, FAINTEST), positive.max()
    return LogNorm(min(low, high / 1.01), high)


def draw_map(ax: Axes, values: np.ndarray, site: dict[str, int], norm: LogNorm) -> None:
    """Draw the map of one transform: channels on x, layers on y."""
    layers, bins = values.shape
    extent = (0, bins * site["channels_per_bin"], -0.5, layers - 0.5)
    ax.imshow(
        np.maximum(values, norm.vmin), COLORS, norm, aspect="auto", interpolation="none", origin="lower", extent=extent
    )
    ax.set_xlim(0, site["channels"])
    ax.spines[:].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def evenness(ratios: Sequence[float | None]) -> str:
    """Format ``peak/median 24``, the median over the layers that have a ratio."""
    known = [ratio for ratio in ratios if ratio is not None]
    return f"peak/median {significant(float(np.median(known)))}" if known else ""


def say_failed(ax: Axes, described: Description) -> None:
    ax.text(
        0.5,
        0.5,
        textwrap.fill(f"× failed: {described.reason}", 50),
        ha="center",
        va="center",
        transform=ax.transAxes,
        fontsize=7,
    )


def plot_layers(
    descriptions: Sequence[Description],
    measures: Mapping[str, tuple[str, str]],
    unit: str,
    reference: tuple[float, str],
) -> Figure:
    """Plot a row of panels per site, a column per measure, on logarithmic axes; the unchanged model
    is the black line. ``measures``: title -> part of the descriptions and name in it; ``reference``: value
    and label of the dotted line."""
    drawn = [(described, look(number)) for number, described in enumerate(descriptions) if not described.reason]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, 0.7 + 1.45 * len(SITES)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(SITES), len(measures), sharex=True)
        for row, site in zip(axes, SITES):
            for ax, (title, (part, name)) in zip(row, measures.items()):
                draw_lines(
                    ax, [(described.content[part][site][name], style) for described, style in drawn], reference[0]
                )
                ax.set_title(f"{site}, {title}")
            row[0].set_ylabel(unit)
        for ax in axes[-1]:
            ax.set_xlabel("layer")
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        draw_legend(figure, drawn, [described.label for described in descriptions if described.reason], reference[1])
    return figure


def look(number: int) -> dict[str, Any]:
    """Choose the line style of a transform: black for the first, which is the unchanged model; the
    next 18 all differ."""
    if number == 0:
        return {"color": INK, "linewidth": 1.6, "linestyle": "-", "zorder": 3}
    hues = PALETTE[:-1]
    return {
        "color": hues[(number - 1) % len(hues)],
        "linewidth": 1.2,
        "linestyle": DASHES[(number - 1) // len(hues) % len(DASHES)],
    }


def draw_lines(ax: Axes, lines: Sequence[tuple[Sequence[float | None], dict[str, Any]]], reference: float) -> None:
    ax.set_yscale("log")
    ax.grid(axis="y")
    ax.axhline(reference, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    for values, style in lines:
        ax.plot(np.array(values, dtype=float), marker="o" if len(values) < 4 else "", markersize=3, **style)
    low, high = ax.get_ylim()
    scale_ticks(ax, True, low, high)


def draw_legend(
    figure: Figure, drawn: Sequence[tuple[Description, dict[str, Any]]], failed: Sequence[str], reference: str
) -> None:
    """Draw the legend above the panels: transforms, the dotted line, and failed transforms."""
    handles = [Line2D([], [], label=clip(described.label, 40), **style) for described, style in drawn]
    handles.append(Line2D([], [], color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), label=reference))
    handles += [
        Line2D([], [], linestyle="", marker="x", color=INK, label=f"{clip(name, 40)}: failed") for name in failed
    ]
    longest = max(len(str(handle.get_label())) + 8 for handle in handles)
    figure.legend(
        handles=handles, loc="outside upper left", ncols=max(1, min(len(handles), LEGEND_CHARACTERS // longest))
    )
