"""Divergence to full precision against the stored bits of a recipe, the kinds of deployment apart.

Every cell is a mark; lines join the Pareto front of bits and divergence, one for recipes that need no
online operations and one for all, and labels name the recipes of the fronts. Stored bits count
everything that a deployment keeps for the linears: codes, scales, zero points, low-rank terms, and
matrices, orders and shifts of online operations. A panel per model, corpus and kind of rounded
tensors; panels of one model share their axis of divergence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from ...config.deployments import ROUNDED, bits
from ..data.records import AXES, check_one_protocol, is_baseline
from ..data.starts import WORDS, kept
from ..style import CONFIDENCE, GRID, INK, PALETTE, recipe_label, row_height
from .panels import scale_ticks
from .placement import label_points
from .study_figures import SETTINGS

BITS, DIVERGENCE = "stored_bits_per_weight", "kl_divergence"
COSTS = {
    "added_bits": "added_bits_per_weight",
    "operations": "online_operations_per_token",
    "parameters": "added_parameters",
}
NEAR = 2  # decimals of bits: smaller differences make no recipe cheaper
SHOWN = 100.0  # multiple of the least divergence of a panel: cells above it are counted, not drawn
LABELLED = 4  # labelled recipes of a front; the table of recommendations lists all
PANEL = (4.0, 2.9)  # inches
ROOM, LEAST = 2.5, 0.5  # of the range of bits, so that labels right of the last mark fit; its least, in bits
# without online operations, with: colour and marker
LOOKS = {False: (PALETTE[0], "o"), True: (PALETTE[1], "D")}
CAPTION = (
    "KL divergence to full precision against stored bits per weight (with scales, zero points, low-rank terms and "
    "matrices of online operations), every quantized cell a mark with its 95 % confidence interval; lower and further "
    "left is better. Panels separate recipes that round weights alone from those that round activations too. Circles "
    "need no online operations, diamonds do; the solid line joins the recipes that no other beats without online "
    "operations, the dashed line those that no other beats at all. Hollow marks kept the start of a training."
)


def points(records: pd.DataFrame, formats: Mapping[str, Any]) -> pd.DataFrame:
    """Build one row per cell and corpus, models and corpora in their order, by bits.

    Columns: the axes, dataset, ``recipe`` (label), ``rounded`` (key of ``ROUNDED``; empty for full
    precision), ``online``, ``bits`` (stored per weight), of these ``added_bits`` (of online
    transforms), ``operations`` (per token) and ``parameters`` of online transforms, ``perplexity``,
    ``divergence`` with ``low`` and ``high`` (95 %), ``baseline``, ``start_kept`` (True if a training of
    the cell kept its start), ``front`` (of bits and divergence among recipes without online
    operations that round the same tensors), ``front_online`` (the same among all of them).
    ``formats`` are the entries of the config.
    """
    check_one_protocol(records[records.metric.isin(["perplexity", DIVERGENCE])], "results")
    stored = records[records.metric == BITS].set_index("cell").value
    found = records[(records.metric == DIVERGENCE) & records.cell.isin(stored.index)].copy()
    found["bits"], found["divergence"], found["baseline"] = found.cell.map(stored), found.value, is_baseline(found)
    found = found[found.baseline | (found.mitigation != "none")]
    found["low"], found["high"] = found.value - CONFIDENCE * found.stderr, found.value + CONFIDENCE * found.stderr
    losses = records[records.metric == "perplexity"].set_index(["cell", "dataset"]).value
    found["perplexity"] = losses.reindex(pd.MultiIndex.from_frame(found[["cell", "dataset"]])).to_numpy()
    found["start_kept"] = found.cell.isin(kept(records))
    for name, metric in COSTS.items():
        found[name] = found.cell.map(records[records.metric == metric].set_index("cell").value).fillna(0.0)
    found["online"] = found.operations > 0
    axes = found[list(AXES)].to_dict("records")
    found["recipe"] = [recipe_label(cell, formats) for cell in axes]
    found["rounded"] = [bits(formats, cell["format"], cell["granularity"]).rounded for cell in axes]
    found = found.sort_values(["bits", "divergence"], kind="stable")
    places = {key: at for at, key in enumerate(dict.fromkeys(zip(records.model, records.dataset)))}
    order = np.argsort([places[key] for key in zip(found.model, found.dataset)], kind="stable")
    found = found.iloc[order].reset_index(drop=True)
    found["front"], found["front_online"] = front(found[~found.online], found), front(found, found)
    columns = ["cell", *AXES, "dataset", "recipe", "rounded", "online", "bits", *COSTS, "perplexity", "divergence"]
    columns += ["low", "high", "baseline", "start_kept", "front", "front_online"]
    return found[columns].reset_index(drop=True)


def front(among: pd.DataFrame, marks: pd.DataFrame) -> np.ndarray:
    """Mark the rows of ``marks`` that no row of ``among`` beats in bits and divergence (boolean); a
    difference below a hundredth of a bit is none."""
    result = pd.Series(False, marks.index)
    for _, part in among[~among.baseline].groupby(["model", "dataset", "rounded"], sort=False):
        part = part.assign(near=part.bits.round(NEAR)).sort_values(["near", "divergence"], kind="stable")
        result[part.index] = part.divergence < part.divergence.cummin().shift(fill_value=float("inf"))
    return result.to_numpy()


def plot(marks: pd.DataFrame, only: str = "", columns: int = 2) -> Figure:
    """Plot a panel for each model, corpus and kind of rounded tensors (or for the kind ``only``) of
    :func:`points`, ``columns`` in a row."""
    panels = [part for key, part in grouped(marks) if only in ("", key[2])]
    rows, columns = max(1, -(-len(panels) // columns)), min(columns, max(1, len(panels)))
    with matplotlib.rc_context(SETTINGS):
        tall = row_height(PANEL[1], 0.75 * PANEL[1], rows, PANEL[0] * columns)
        figure = Figure(figsize=(PANEL[0] * columns, tall * rows + 0.45), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False)
        for number, ax in enumerate(grid.flat):
            if number < len(panels):
                draw(ax, panels[number], ranges(marks, panels[number]), number % columns == 0)
            else:
                ax.set_axis_off()
        if not panels:
            grid[0, 0].text(0.5, 0.5, "no cell was measured", ha="center", va="center")
        else:
            figure.legend(handles=legend(pd.concat(panels)), loc="outside upper left", ncols=2, fontsize=7)
        figure.draw_without_rendering()
        for part, ax in zip(panels, grid.flat):
            label_points(ax, named(visible(part)), "bits", "divergence", "recipe")
    return figure


def grouped(marks: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Split the cells by model, corpus and kind of rounded tensors, kinds in the order of ``ROUNDED``."""
    found = []
    for (model, dataset), own in quantized(marks).groupby(["model", "dataset"], sort=False):
        found += [((model, dataset, kind), own[own.rounded == kind]) for kind in ROUNDED if (own.rounded == kind).any()]
    return found


def quantized(marks: pd.DataFrame) -> pd.DataFrame:
    return marks[~marks.baseline & (marks.divergence > 0)]


def named(part: pd.DataFrame) -> pd.DataFrame:
    """Select the recipes of one panel to label: those on a front, at most ``LABELLED`` of each, spread over
    its bits."""
    chosen = [spread(part[part[front]], LABELLED) for front in ("front_online", "front")]
    return pd.concat(chosen).drop_duplicates("cell")


def spread(part: pd.DataFrame, count: int) -> pd.DataFrame:
    """Select at most ``count`` rows, the first and the last among them."""
    if len(part) <= count:
        return part
    return part.iloc[np.unique(np.linspace(0, len(part) - 1, count).round().astype(int))]


def ranges(marks: pd.DataFrame, part: pd.DataFrame) -> tuple[tuple[float, float], tuple[float, float]]:
    """Compute limits of bits, those of the panel, and of divergence, those of all cells of its model and
    corpus."""
    panels = [shown for key, shown in grouped(marks) if key[:2] == (part.model.iloc[0], part.dataset.iloc[0])]
    own = pd.concat([visible(panel) for panel in panels])
    part = visible(part)
    low, room = part.bits.min(), max(part.bits.max() - part.bits.min(), LEAST)
    least = min(own.divergence.min(), own.low[own.low > 0].min()) if (own.low > 0).any() else own.divergence.min()
    return (low - 0.08 * room, low + ROOM * room), (least / 1.6, own.divergence.max() * 1.6)


def visible(part: pd.DataFrame) -> pd.DataFrame:
    """Select the cells of a panel that are drawn."""
    return part[part.divergence <= SHOWN * part.divergence.min()]


def draw(ax: Axes, part: pd.DataFrame, limits: tuple[tuple[float, float], tuple[float, float]], first: bool) -> None:
    """Draw one panel: marks with intervals, and both fronts."""
    part, hidden = visible(part), len(part) - len(visible(part))
    ax.set_yscale("log")
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])
    scale_ticks(ax, True, *limits[1])
    places = ticks(part.bits)
    ax.xaxis.set_major_locator(FixedLocator(places))
    ax.xaxis.set_major_formatter(FixedFormatter([f"{place:.4g}" for place in places]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(color=GRID)
    for online, own in part.groupby("online"):
        color, marker = LOOKS[bool(online)]
        errors = [(own.divergence - own.low.clip(lower=0)).fillna(0), (own.high - own.divergence).fillna(0)]
        on_front = own.front | own.front_online
        ax.errorbar(own.bits, own.divergence, errors, fmt="none", ecolor=color, elinewidth=0.8, alpha=0.5, zorder=2)
        for cells, size, alpha in ((own[~on_front], 3.4, 0.55), (own[on_front], 5.0, 1.0)):
            for start_kept, shown in cells.groupby("start_kept"):
                face = "white" if start_kept else color
                ax.plot(shown.bits, shown.divergence, marker, ms=size, mfc=face, mec=color, alpha=alpha, zorder=3)
    for column, style in (("front_online", (0, (4, 2))), ("front", "-")):
        line = part[part[column]]
        ax.plot(line.bits, line.divergence, color=INK, lw=0.9, ls=style, zorder=1.5)
    ax.set_title(f"{part.model.iloc[0]}\n{ROUNDED[part.rounded.iloc[0]]}")
    above = f"\n{hidden} cells above {SHOWN:g} times the least are not shown" if hidden else ""
    ax.set_xlabel(f"stored bits per weight{above}")
    if first:
        ax.set_ylabel(f"KL divergence, nats/token\n({part.dataset.iloc[0]})")


def ticks(bits: pd.Series) -> Sequence[float]:
    """Round values between the least and the largest bits of a panel, or the least where there is none."""
    low, high = bits.min(), bits.max()
    found = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if high - low > LEAST / 10 else []
    beside = (high - low) / 20
    return [tick for tick in found if low - beside <= tick <= high + beside] or [low]


def legend(marks: pd.DataFrame) -> list[Line2D]:
    """Build the legend of the marks and lines that occur."""
    own, words = marks, {False: "without online operations", True: "with online operations"}
    handles = [
        Line2D([], [], ls="", marker=marker, color=color, label=words[online])
        for online, (color, marker) in LOOKS.items()
        if (own.online == online).any()
    ]
    if (~own.online).any():
        handles.append(Line2D([], [], color=INK, lw=0.9, label="best without"))
    if own.online.any():
        handles.append(Line2D([], [], color=INK, lw=0.9, ls=(0, (4, 2)), label="best with"))
    if own.start_kept.any():
        handles.append(Line2D([], [], ls="", marker="o", color=INK, mfc="white", label=WORDS))
    return handles
