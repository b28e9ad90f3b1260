"""Divergence against stored bits of allocations: the predicted front, and measured cells next to uniform schemes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...config.cells import MIXED
from ...ground.storage import read_json
from ..data.records import AXES
from ..style import CONFIDENCE, HEIGHT, INK, PALETTE, WIDTH, row_height, value_label
from .panels import scale_ticks
from .pareto import BITS
from .scene import clip
from .study_figures import SETTINGS

FRONT, PREDICTED, MEASURED, ALLOCATED = (
    "predicted front",
    "uniform, predicted",
    "uniform, measured",
    "allocated, measured",
)
LOOKS: dict[str, dict[str, Any]] = {
    FRONT: {"color": INK, "linestyle": "--", "linewidth": 1.0, "zorder": 1},
    PREDICTED: {"color": PALETTE[0], "fmt": "o", "mfc": "white", "ms": 4.5, "zorder": 2},
    MEASURED: {"color": PALETTE[0], "fmt": "o", "ms": 4.5, "zorder": 3},
    ALLOCATED: {"color": PALETTE[1], "fmt": "s", "ms": 4.5, "zorder": 4},
}
CAPTION = (
    "Divergence to full precision against stored bits per weight, a panel per model, transform and mitigation. The "
    "dashed line is what the best allocation predicts at any number of bits, from the candidates of the first one in "
    "the panel. Filled marks are measured, with 95 % intervals; hollow ones are predictions for uniform candidates."
)
COLUMNS = ("model", "transform", "mitigation", "dataset", "kind", "name", "bits", "divergence", "low", "high")


def points(paths: Sequence[str | Path], records: pd.DataFrame) -> pd.DataFrame:
    """Marks of the figure, one row each (``COLUMNS``): from the errors of allocated cells and the records of all."""
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, ...]] = set()
    measured = _measured(records)
    for content in map(read_json, paths):
        panel = tuple(content["axes"][axis] for axis in AXES[:3])
        if "allocation" not in content or panel in seen:
            continue
        seen.add(panel)
        formats = {name.partition(" ")[0] for name in content["allocation"]["uniform"]}
        own = measured[(measured[list(AXES[:3])] == list(panel)).all(axis=1)]
        own = own[(own.granularity == MIXED) | own.format.isin(formats)]
        for dataset, part in own.groupby("dataset", sort=False):
            common = {**dict(zip(AXES[:3], panel)), "dataset": dataset}
            rows += [{**common, **row} for row in (*_predicted(content["allocation"]), *_rows(part))]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _measured(records: pd.DataFrame) -> pd.DataFrame:
    """Divergences of quantized cells with their stored ``bits``."""
    bits = records[records.metric == BITS].set_index("cell").value
    found = records[(records.metric == "kl_divergence") & (records.mitigation != "none")]
    return found.assign(bits=found.cell.map(bits))


def _predicted(allocation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for place in allocation["front"]:
        yield {"kind": FRONT, "name": "", "bits": place["bits"], "divergence": place["predicted_kl"]}
    for name, place in allocation["uniform"].items():
        yield {"kind": PREDICTED, "name": name, "bits": place["bits"], "divergence": place["predicted_kl"]}


def _rows(cells: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for cell in cells.itertuples():
        mixed = cell.granularity == MIXED
        yield {
            "kind": ALLOCATED if mixed else MEASURED,
            "name": cell.format if mixed else f"{cell.format} {cell.granularity}",
            "bits": cell.bits,
            "divergence": cell.value,
            "low": cell.value - CONFIDENCE * cell.stderr,
            "high": cell.value + CONFIDENCE * cell.stderr,
        }


def plot(marks: pd.DataFrame) -> Figure:
    """Plot a panel for each model, transform, mitigation and corpus, two in a row."""
    panels = [(key, part) for key, part in marks.groupby(["model", "transform", "mitigation", "dataset"], sort=False)]
    width, height = min(2, max(1, len(panels))), max(1, -(-len(panels) // 2))
    with matplotlib.rc_context(SETTINGS):
        tall = row_height(0.75 * HEIGHT, 0.5 * HEIGHT, height, WIDTH)
        figure = Figure(figsize=(WIDTH, tall * height + 0.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(height, width, squeeze=False)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for ax, ((model, transform, mitigation, dataset), part) in zip(axes.flat, panels):
            draw(ax, part)
            recipe = f"{value_label('transform', transform)} + {value_label('mitigation', mitigation)}"
            ax.set_title("\n".join(clip(line, 84 // width) for line in (f"{model}, {dataset}", recipe)))
            ax.set_xlabel("stored bits per weight")
            ax.set_ylabel("KL divergence (nats/token)")
        if panels:
            handles, labels = axes.flat[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return figure


def draw(ax: Axes, part: pd.DataFrame) -> None:
    """Draw one panel, with the names of allocated cells next to their marks."""
    ax.set_yscale("log")
    ax.grid(axis="y")
    for kind, look in LOOKS.items():
        own = part[part.kind == kind].sort_values("bits")
        if kind == FRONT:
            ax.plot(own.bits, own.divergence, label=kind, **look)
            continue
        spread = [(own.divergence - own.low).fillna(0), (own.high - own.divergence).fillna(0)]
        ax.errorbar(own.bits, own.divergence, spread, label=kind, **look)
    scale_ticks(ax, True, *ax.get_ylim())
    for row in part[part.kind == ALLOCATED].itertuples():
        ax.annotate(row.name, (row.bits, row.divergence), (4, -8), textcoords="offset points", fontsize=6.5)
