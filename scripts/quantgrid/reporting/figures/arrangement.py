"""Arrangement of a study's figure: positions and titles of its panels, and the baselines in
each."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from ..style import value_label


def in_every_panel(marks: pd.DataFrame, shared: list[str]) -> pd.DataFrame:
    """Repeat baselines in every panel of quantized cells (that agree in the ``shared`` axes)
    instead of a separate panel; those without such a panel stay unchanged."""
    quantized = marks[~marks.baseline]
    panels = quantized[["panel", "panel_position", *shared]].drop_duplicates()
    if panels.empty:
        return marks
    baselines = marks[marks.baseline]
    free = baselines.drop(columns=["panel", "panel_position"])
    repeated = free.merge(panels, on=shared) if shared else free.merge(panels, how="cross")
    return pd.concat([repeated, baselines[~baselines.cell.isin(repeated.cell)], quantized])


def arranged(marks: pd.DataFrame, facet: str | None) -> dict[str, tuple[int, int]]:
    """Place the panels: panel -> (row, column). With a facet and several models each model has a
    row; else rows of three, or of two for four panels."""
    names = list(dict.fromkeys(marks.panel))
    quantized = marks[~marks.baseline]
    if (
        facet
        and facet != "model"
        and quantized.model.nunique() > 1
        and quantized.groupby("panel").model.nunique().max() == 1
    ):
        rows, columns = ({value: at for at, value in enumerate(quantized[axis].unique())} for axis in ("model", facet))
        return {
            name: (rows[mark.model], columns[getattr(mark, facet)])
            for name, mark in ((name, next(quantized[quantized.panel == name].itertuples())) for name in names)
        }
    width = 2 if len(names) == 4 else min(len(names), 3)
    return {name: divmod(at, width) for at, name in enumerate(names)}


def title(panel: str, places: Mapping[str, tuple[int, int]], facet: str | None, marks: pd.DataFrame) -> str:
    """Return the title of a panel: its label; right of the first in a model's row only the value of
    the facet."""
    (row, column), own = places[panel], marks[(marks.panel == panel) & ~marks.baseline]
    if (
        facet
        and (row, column - 1) in places.values()
        and own.model.nunique() == 1
        and panel.startswith(f"{own.model.iloc[0]}, ")
    ):
        return value_label(facet, getattr(next(own.itertuples()), facet))
    return panel
