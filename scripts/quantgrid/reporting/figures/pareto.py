"""Perplexity against the cost of a recipe: stored bits per weight, and online operations of its
transform per token.

Every cell is a dot; labels mark the Pareto front: in bits and perplexity on the left, in bits,
operations and perplexity on the right. Stored bits count everything that a deployment keeps for the
linears: codes, scales, zero points, low-rank terms, and matrices, orders and shifts of online
operations. A row of panels per model and corpus; full precision is the dashed line.
"""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..data.records import AXES, check_one_protocol, is_baseline
from ..data.starts import WORDS, kept
from ..style import CONFIDENCE, GRID, INK, MUTED, PALETTE, WIDTH, recipe_label, significant, superscript
from .panels import scale_ticks
from .study_figures import SETTINGS

BITS = "stored_bits_per_weight"
COSTS = {
    "added_bits": "added_bits_per_weight",
    "operations": "online_operations_per_token",
    "parameters": "added_parameters",
}
# multiple of full precision: cells above it are counted, and omitted from the figure (not from the
# table)
SHOWN = 50.0
LABELLED = 8  # labelled recipes of a front; its table lists all
PANEL, LINE = 2.0, 0.13  # inches of a panel and of a line of its list
CLOSE = 0.06  # share of a panel's height within which two numbers on the same side would touch
CAPTION = (
    "Perplexity against stored bits per weight (left; with scales, zero points, low-rank terms and matrices of online "
    "transforms) and against "
    "the additions and multiplications per token of online transforms (right), every quantized cell a dot "
    "with its 95 % confidence "
    "interval; lower and further left is better. Named are the cells that no other beats: on the left in bits "
    "and perplexity, joined by "
    "a line, on the right in bits, operations and perplexity. The dashed line is full precision. Hollow "
    "dots kept the start of a "
    "training, so that their cell is what the training started from."
)


def points(records: pd.DataFrame) -> pd.DataFrame:
    """Build one row per cell and corpus, models and corpora in their order, by bits: the axes,
    dataset, bits (stored per weight), of these added_bits (of online transforms), operations (per
    token) and parameters of online transforms, perplexity, low, high (95 %), baseline, start_kept
    (True if a training of the cell kept its start), front (of bits and perplexity), frugal (of
    these and operations)."""
    check_one_protocol(records[records.metric == "perplexity"], "results")
    bits = records[records.metric == BITS].set_index("cell").value
    found = records[(records.metric == "perplexity") & records.cell.isin(bits.index)].copy()
    found["bits"], found["perplexity"], found["baseline"] = found.cell.map(bits), found.value, is_baseline(found)
    found["start_kept"] = found.cell.isin(kept(records))
    found["low"], found["high"] = found.value - CONFIDENCE * found.stderr, found.value + CONFIDENCE * found.stderr
    for name, metric in COSTS.items():
        found[name] = found.cell.map(records[records.metric == metric].set_index("cell").value).fillna(0.0)
    found = found[found.baseline | (found.mitigation != "none")].sort_values(["bits", "perplexity"], kind="stable")
    places = {key: at for at, key in enumerate(dict.fromkeys(zip(records.model, records.dataset)))}
    found = found.iloc[np.argsort([places[key] for key in zip(found.model, found.dataset)], kind="stable")].reset_index(
        drop=True
    )
    found["front"] = found["frugal"] = False
    for _, part in found[~found.baseline].groupby(["model", "dataset"], sort=False):
        part = part.assign(near=part.bits.round(2)).sort_values(
            ["near", "perplexity"], kind="stable"
        )  # ignore differences below a hundredth of a bit
        found.loc[part.index, "front"] = part.perplexity < part.perplexity.cummin().shift(fill_value=float("inf"))
        beaten = [
            ((part.near <= row.near) & (part.operations <= row.operations) & (part.perplexity < row.perplexity)).any()
            for row in part.itertuples()
        ]
        found.loc[part.index, "frugal"] = ~np.array(beaten, dtype=bool)
    columns = [
        "cell",
        *AXES,
        "dataset",
        "bits",
        *COSTS,
        "perplexity",
        "low",
        "high",
        "baseline",
        "start_kept",
        "front",
        "frugal",
    ]
    return found[columns].reset_index(drop=True)


def recipe(row: object) -> str:
    """Format a cell as ``hadamard + GPTQ, INT4 group-64``, with a note if it kept the start of a
    training."""
    label = recipe_label(row.transform, row.mitigation, row.granularity, row.format)  # type: ignore[attr-defined]
    return label + (f" ({WORDS})" if row.start_kept else "")  # type: ignore[attr-defined]


def plot(marks: pd.DataFrame) -> Figure:
    """Plot two panels for each model and corpus of :func:`points`, with a list of the labelled
    recipes below each."""
    groups = list(marks.groupby(["model", "dataset"], sort=False)) or [(("no perplexity", "no corpus"), marks)]
    lists = [[named(part, chosen) for chosen in ("front", "frugal")] for _, part in groups]
    heights = [height for pair in lists for height in (PANEL, LINE * max(1, *map(len, pair)))]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.55 * len(groups)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2 * len(groups), 2, squeeze=False, height_ratios=heights)
        for row, (((model, dataset), part), pair) in enumerate(zip(groups, lists)):
            for ax, below, lines, cost, chosen in zip(
                axes[2 * row], axes[2 * row + 1], pair, ("bits", "operations"), ("front", "frugal")
            ):
                draw(ax, part, cost, chosen)
                ax.set_xlabel({"bits": "stored bits per weight", "operations": "online operations per token"}[cost])
                below.set_axis_off()
                below.text(
                    0, 1, "\n".join(lines), transform=below.transAxes, va="top", fontsize=6.8, linespacing=1.35
                ).set_in_layout(False)
            axes[2 * row, 0].set_title(f"{model}, {dataset}")
            axes[2 * row, 0].set_ylabel("perplexity\n(lower is better)")
            power_ticks(axes[2 * row, 1], part.operations.max() if len(part) else 0.0)
    return figure


def visible(part: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """Select the quantized cells to draw, and the perplexity of full precision (of the best cell if
    that was not measured)."""
    full, cells = part[part.baseline], part[~part.baseline]
    reference = full.perplexity.iloc[0] if len(full) else cells.perplexity.min()
    shown = cells[cells.perplexity <= SHOWN * reference]
    return (shown if len(shown) else cells), reference


def named(part: pd.DataFrame, chosen: str) -> list[str]:
    """List the recipes of the column ``chosen`` by number, and count those not named or not
    shown."""
    shown, _ = visible(part)
    front = shown[shown[chosen]]
    lines = [f"{number}  {recipe(row)}" for number, row in enumerate(front.head(LABELLED).itertuples(), 1)]
    lines += [f"({len(front) - LABELLED} more not named)"] if len(front) > LABELLED else []
    left_out = int((~part.baseline).sum()) - len(shown)
    return [*lines, *([f"({left_out} cells above {SHOWN:g} times full precision not shown)"] if left_out else [])]


def draw(ax: Axes, part: pd.DataFrame, cost: str, chosen: str) -> None:
    """Draw one panel over the column ``cost``; the recipes of the column ``chosen`` are
    numbered."""
    if part.empty:
        ax.text(0.5, 0.5, "no cell was measured", ha="center", va="center", transform=ax.transAxes)
        return
    shown, reference = visible(part)
    front, rest = shown[shown[chosen]], shown[~shown[chosen]]
    ax.set_yscale("log")
    for cell, look in (
        (rest, {"fmt": "o", "ms": 3.2, "color": MUTED, "ecolor": GRID, "elinewidth": 0.8, "zorder": 2}),
        (
            front,
            {"fmt": "o-" if chosen == "front" else "o", "ms": 4.5, "color": PALETTE[0], "elinewidth": 1.0, "zorder": 3},
        ),
    ):
        ax.errorbar(
            cell[cost],
            cell.perplexity,
            [(cell.perplexity - cell.low).fillna(0), (cell.high - cell.perplexity).fillna(0)],
            **look,
        )
    for cell, size, color in ((rest, 3.2, MUTED), (front, 4.5, PALETTE[0])):
        ax.plot(
            cell[cost][cell.start_kept],
            cell.perplexity[cell.start_kept],
            "o",
            ms=size,
            mfc="white",
            mec=color,
            zorder=4,
        )
    low = min([reference, *front.perplexity, *front.low[front.low > 0]]) * 0.95
    high = max([shown.perplexity.max(), *front.high.dropna()]) * 1.15
    ax.set_ylim(low, high)
    scale_ticks(ax, True, low, high)
    ax.grid(axis="y")
    number_dots(ax, front.head(LABELLED), cost)
    if part.baseline.any():
        ax.axhline(reference, color=INK, lw=0.9, ls=(0, (4, 2)), zorder=1)
        ax.annotate(
            significant(reference, 4),
            (1, reference),
            (2, 0),
            ax.get_yaxis_transform(),
            "offset points",
            va="center",
            fontsize=6.8,
        )


def number_dots(ax: Axes, front: pd.DataFrame, cost: str) -> None:
    """Number the dots, on alternate sides if dots are close above each other."""
    low, high = np.log(ax.get_ylim())
    # height of the dot below and the side of its number
    sides: dict[float, tuple[float, int]] = {}
    order = front.assign(number=range(1, len(front) + 1)).sort_values("perplexity")
    for row in order.itertuples():
        at, height = getattr(row, cost), (np.log(row.perplexity) - low) / (high - low)
        last, side = sides.get(at, (-1.0, -1))
        side = -side if height - last < CLOSE else 1
        sides[at] = height, side
        ax.annotate(
            str(row.number),
            (at, row.perplexity),
            (4 * side, 1),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            fontsize=7,
            color=PALETTE[0],
        )


def power_ticks(ax: Axes, largest: float) -> None:
    """Set up an axis of counts from zero, linear up to a thousand and logarithmic above: zero and
    powers of ten, if they are few also three times these."""
    ax.set_xscale("symlog", linthresh=1000)
    powers = range(3, math.floor(math.log10(max(largest, 1000))) + 1)
    ticks = [
        (factor, power)
        for power in powers
        for factor in ((1, 3) if len(powers) < 3 else (1,))
        if factor * 10**power <= 1.2 * largest
    ]
    ax.set_xticks(
        [0, *(factor * 10**power for factor, power in ticks)],
        ["0", *(f"{f'{factor}×' if factor > 1 else ''}10{superscript(power)}" for factor, power in ticks)],
    )
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(-300, max(largest, 1000) * 1.6)
