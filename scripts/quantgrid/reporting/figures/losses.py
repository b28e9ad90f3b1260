"""Training-loss curves: the loss of every step, one panel per learned transform and its target, or
per trained cell.

If layers are trained one by one, each layer is a thin line and their mean a thick one, on a log
axis because their losses differ widely.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...ground.errors import ConfigError
from ..style import GRID, HEIGHT, PALETTE, WIDTH, row_height
from .panels import scale_ticks
from .scene import clip
from .study_figures import SETTINGS

COLUMNS = ("part", "step", "loss", "learning_rate")


def read(paths: Sequence[str | Path], labels: Sequence[str]) -> pd.DataFrame:
    """Read the losses of several trainings as one table, ``label`` first; a :class:`ConfigError`
    names an invalid file."""
    frames = []
    for path, label in zip(paths, labels, strict=True):
        frame = pd.read_csv(path, dtype={"part": str})
        if tuple(frame.columns) != COLUMNS:
            raise ConfigError(f"{path}: not a table of losses (columns {', '.join(COLUMNS)}); delete it and run again")
        frames.append(frame.assign(label=label)[["label", *COLUMNS]])
    return pd.concat(frames, ignore_index=True)


def plot(table: pd.DataFrame, labels: Sequence[str]) -> Figure:
    """Plot small multiples in at most two columns, one for each of ``labels``; a model common to
    all is not named."""
    width = min(len(labels), 2)
    models = {label.partition(", ")[0] for label in labels}
    height = -(-len(labels) // width)
    with matplotlib.rc_context(SETTINGS):
        tall = row_height(0.65 * HEIGHT, 0.4 * HEIGHT, height, WIDTH)
        figure = Figure(figsize=(WIDTH, tall * height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(height, width, squeeze=False).flat)
        for position, (ax, label) in enumerate(zip(axes, labels)):
            draw(ax, table[table.label == label])
            ax.set_title(clip(label.partition(", ")[2] if len(models) == 1 else label, 84 // width))
            ax.set_xlabel("step")
            ax.set_ylabel("loss" if position % width == 0 else "")
        for ax in axes[len(labels) :]:
            ax.set_axis_off()
    return figure


def draw(ax: Axes, losses: pd.DataFrame) -> None:
    """Draw one training: its losses over its steps; a text if it took no step."""
    ax.grid(axis="y")
    if losses.empty:
        ax.text(0.5, 0.5, "no steps", ha="center", va="center", transform=ax.transAxes)
        return
    parts = losses.pivot_table(index="step", columns="part", values="loss", sort=False).sort_index()
    if parts.shape[1] > 1 and (parts > 0).all(axis=None):
        ax.set_yscale("log")
        scale_ticks(ax, True, parts.min(axis=None), parts.max(axis=None))
    for part in parts if parts.shape[1] > 1 else ():
        ax.plot(parts.index, parts[part], color=GRID, linewidth=0.5)
    ax.plot(parts.index, parts.mean(axis=1), color=PALETTE[0], marker="o" if len(parts) < 4 else "")
