"""Share of each axis in a recommended recipe: paired comparisons of its divergence with that of cells
that differ from it in one axis alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ...config.deployments import bits
from ..data.paired import estimate
from ..data.records import AXES, coarseness
from ..figures.pareto import DIVERGENCE
from ..style import recipe_label, significant, value_label

# the value that an axis is compared with, where it was measured
PLAIN = {"transform": "none", "mitigation": "rtn"}


@dataclass(frozen=True)
class Measured:
    """Cells on one corpus: their axes (index: cell), the divergence of every window by cell, and the
    format entries of the config; ``where`` names the windows to readers, empty for those of the study.

    Of cells with fewer windows, as those that leave a race, the first windows count.
    """

    cells: pd.DataFrame
    values: Mapping[str, np.ndarray]
    formats: Mapping[str, Any]
    where: str = ""


def reasons(
    lines: Sequence[Mapping[str, Any]], records: pd.DataFrame, items: pd.DataFrame, formats: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Build a sentence for each model, corpus and kind of rounded tensors (``model``, ``cell``,
    ``text``): its recommended recipe, with online operations where they are allowed, and the paired
    difference that each axis makes. ``lines`` are those of one budget from :func:`headlines.headlines`."""
    chosen: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for line in lines:
        chosen[line["model"], line["dataset"], line["kind"].partition("+")[0]] = line
    cells = records[(records.status == "ok") & (records.mitigation != "none")].drop_duplicates("cell").set_index("cell")
    kept = items[(items.metric == DIVERGENCE) & items.cell.isin(cells.index)].sort_values("item")
    measured = {
        dataset: Measured(cells, {cell: own.value.to_numpy() for cell, own in part.groupby("cell")}, formats)
        for dataset, part in kept.groupby("dataset")
    }
    found = [
        {"model": model, "cell": line["cell"], "text": sentence(line["cell"], measured[dataset])}
        for (model, dataset, _), line in chosen.items()
    ]
    return [reason for reason in found if reason["text"]]


def sentence(cell: str, measured: Measured) -> str:
    """Say how much each axis of a cell changed its divergence, the largest gain first; empty if no plainer
    cell was measured that differs in one axis alone."""
    own = measured.cells.loc[cell]
    label, bought = recipe_label(own[list(AXES)].to_dict(), measured.formats), []
    for axis in AXES[1:]:
        other = counterpart(cell, axis, measured)
        if other is not None:
            values = measured.values[cell], measured.values[other]
            shared = min(map(len, values))
            values = values[0][:shared], values[1][:shared]
            effect, low, high, _ = estimate([values[0] - values[1]])
            numbers = f"{signed(effect)} ({signed(low)} to {signed(high)})"
            share = f"{abs(effect) / values[1].mean():.0%} {'less' if effect < 0 else 'more'}"
            names = f"{value_label(axis, own[axis])} instead of {value_label(axis, measured.cells.loc[other, axis])}"
            bought.append((effect, f"{names} {numbers}, {share}"))
    changes = "; ".join(text for _, text in sorted(bought))
    return changes and f"{label}, change of divergence in nats/token{measured.where}: {changes}."


def counterpart(cell: str, axis: str, measured: Measured) -> str | None:
    """Find the cell that a recipe is compared with on one axis: plain transform and mitigation, coarsest
    granularity, of formats with the same bits the one with the largest divergence.

    None if there is no such cell, or the recipe is the plain one.
    """
    own, cells = measured.cells.loc[cell], measured.cells[measured.cells.index.isin(measured.values)]
    others = [name for name in AXES if name != axis]
    found = cells[(cells[others] == own[others]).all(axis=1) & (cells[axis] != own[axis])]
    if axis in PLAIN:
        found = found[found[axis] == PLAIN[axis]]
    elif axis == "granularity":
        found = found[np.array([coarseness(value) < coarseness(own[axis]) for value in found[axis]], dtype=bool)]
        found = found.sort_values(axis, key=lambda column: column.map(coarseness), kind="stable")
    else:
        width = bits(measured.formats, own[axis], own.granularity)
        alike = [bits(measured.formats, name, own.granularity) == width for name in found[axis]]
        found = found[np.array(alike, dtype=bool)]
        means = [-measured.values[name].mean() for name in found.index]
        found = found.iloc[np.argsort(means, kind="stable")]
    return None if found.empty else str(found.index[0])


def signed(value: float) -> str:
    """Format a difference with its sign: ``−0.0427``."""
    return ("−" if value < 0 else "+") + significant(abs(value))
