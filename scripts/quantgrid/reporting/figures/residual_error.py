"""Error of the residual stream over depth (``evaluation/residual_error.py``): a panel per cell with
the errors that its layers add and propagate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...ground.storage import read_json
from ...learning import outcomes
from ..data.records import AXES
from ..data.starts import WORDS
from ..style import HEIGHT, INK, PALETTE, WIDTH, row_height, value_label
from .panels import scale_ticks
from .scene import clip
from .study_figures import SETTINGS

PARTS = ("error", "added", "passed_on")
MEASURES = (*PARTS, *(f"{part}_squared" for part in PARTS), "interaction")
LINES = {
    "error": ("all of it", INK, "-"),
    "passed_on": ("passed on from the layers before", PALETTE[0], "--"),
    "added": ("added by the layer", PALETTE[1], ":"),
}
CAPTION = (
    "Relative error of the residual stream after each decoder layer, the mean over tokens of norms relative to full "
    "precision, and its two "
    "parts: what the quantized layer makes of an exact input (added), and what it makes of the error in its input "
    "(passed on). The two add "
    "up as vectors, not as norms; the table of the figure has the squares and the interaction that completes their "
    "sum. A panel per cell, layers from 1."
)


def read(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Read one row per cell, corpus and layer (from 1): the axes, corpus, layer, the relative
    errors of ``MEASURES``, and whether a training of the cell kept its start; failed cells have
    none, and layers measured before the squares were have none of these."""
    rows: list[dict[str, Any]] = []
    for content in map(read_json, paths):
        axes = {name: content["axes"][name] for name in (*AXES, "corpus")}
        kept = outcomes.columns(content.get("trainings", {}))["start_kept"] == "all"
        rows += [
            {**axes, "layer": number, **parts, "start_kept": kept}
            for number, parts in enumerate(content.get("layers", []), 1)
        ]
    return pd.DataFrame(rows, columns=[*AXES, "corpus", "layer", *MEASURES, "start_kept"])


def plot(table: pd.DataFrame) -> Figure:
    """Plot a panel for each cell, with one logarithmic axis: for one model three per row, for
    several a column for each model."""
    cells = [(recipe, part) for recipe, part in table.groupby([*AXES[1:], "corpus"], sort=False)]
    models = list(table.model.unique())
    several = len(models) > 1
    width = len(models) if several else min(3, max(1, len(cells)))
    height = len(cells) if several else max(1, -(-len(cells) // width))
    tall = row_height((0.36 if several else 0.6) * HEIGHT, 0.22 * HEIGHT, height, WIDTH)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, tall * height + 0.4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(height, width, squeeze=False, sharex="col", sharey=True)
        drawn = set()
        for row, (_, part) in enumerate(cells):
            for model, own in part.groupby("model", sort=False):
                place = (row, models.index(model)) if several else divmod(row, width)
                draw(panels[place], own)
                title = "\n".join(clip(line, 72 // width) for line in names(own.iloc[0], table))
                panels[place].set_title("" if several else title)
                drawn.add(place)
            if several:
                panels[row, 0].set_title(", ".join(names(part.iloc[0], table)), fontsize=7.5)
        finish(panels, drawn)
        for ax, model in zip(panels[0], models if several else ()):
            ax.annotate(
                clip(model, 84 // width),
                (0, 1),
                (0, 18),
                "axes fraction",
                "offset points",
                fontsize=8.5,
                fontweight="bold",
            )
        if cells:
            figure.legend(handles=panels[min(drawn)].get_lines(), loc="outside upper left", ncols=3)
    return figure


def draw(ax: Axes, cell: pd.DataFrame) -> None:
    for name, (label, color, style) in LINES.items():
        values = cell[name].where(cell[name] > 0)  # nothing passed on has no place on a logarithmic axis
        ax.plot(cell.layer, values, color=color, linestyle=style, label=label)
    ax.set_yscale("log")
    ax.grid(axis="y")


def finish(panels: np.ndarray, drawn: set[tuple[int, int]]) -> None:
    """Label the axes of the outer panels and remove empty ones."""
    for place, ax in np.ndenumerate(panels):
        if place not in drawn:
            ax.set_axis_off()
            continue
        below = (place[0] + 1, place[1]) not in drawn
        ax.set_xlabel("layer" if below else "")
        ax.tick_params(labelbottom=below)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set_ylabel("relative error" if (place[0], place[1] - 1) not in drawn else "")
    if drawn:
        scale_ticks(panels[min(drawn)], True, *panels[min(drawn)].get_ylim())


def names(cell: Any, table: pd.DataFrame) -> list[str]:
    """Name a cell in two lines without its model: its recipe, and what is rounded; parts common to
    all cells, or implied by the format, are omitted."""
    varied = [axis for axis in (*AXES[1:], "corpus") if table[axis].nunique() > 1]
    if "granularity" in varied and table.groupby("format").granularity.nunique().max() == 1:
        varied.remove("granularity")
    recipe = " + ".join(value_label(axis, cell[axis]) for axis in ("transform", "mitigation")) + (
        f" ({WORDS})" if cell.start_kept else ""
    )
    rest = [axis for axis in varied if axis not in ("transform", "mitigation")] or ["format"]
    return [recipe, ", ".join(value_label(axis, cell[axis]) for axis in rest)]
