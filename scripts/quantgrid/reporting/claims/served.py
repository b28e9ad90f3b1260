"""Recipes that servers compute as measured, from the planned verdicts of the export targets; the best
recipe that a target can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from ...config.cells import AXES, Cell
from ...config.exports import cell_name
from ...config.grid import expand_studies
from ...config.planned_features import planned_verdict
from ...exports.targets import TARGETS
from ...exports.verdicts import EXACT
from ...ground.errors import ConfigError
from ..style import recipe_label

RESEARCH = ("dense",)  # targets without the size of the recipe: not served
LEGEND = "served exactly: what these programs compute from an export is what was measured (docs/how-to/deploy.md)"
MEANING = (
    "These programs compute from an export what was measured here. Other recipes are rounded again or refused by every "
    "format; make export says how."
)


def served_by(config: Mapping[str, Any], cell: Cell) -> str:
    """Programs that compute a cell exactly from an export, with its target, such as
    ``compressed-tensors: transformers, vLLM``; empty if none does."""
    found = []
    for target in (target for target in TARGETS if target not in RESEARCH):
        verdict = planned_verdict(config, cell, target)
        if verdict.kind == EXACT and verdict.loaders:
            found.append(f"{target}: {', '.join(verdict.loaders)}")
    return "; ".join(found)


def recipes(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """The quantized cells of a config that some program serves exactly: axes, ``recipe`` and ``served``
    (:func:`served_by`)."""
    found = []
    for cell in (cell for cell in expand_studies(config) if cell.quantized):
        if programs := served_by(config, cell):
            found.append({**cell.axes, "recipe": recipe_label(cell.axes, config["formats"]), "served": programs})
    return found


def cells_of(found: pd.DataFrame, planned: Iterable[Cell]) -> list[Cell | None]:
    """The planned cell of each row, by its axes; None if the config no longer plans it."""
    known = {tuple(cell.axes.values()): cell for cell in planned}
    return [known.get(axes) for axes in found[list(AXES.values())].astype(str).itertuples(index=False, name=None)]


def with_servers(found: pd.DataFrame, config: Mapping[str, Any], planned: Iterable[Cell]) -> pd.DataFrame:
    """Add the column ``served`` (:func:`served_by`) to a recommendation."""
    cells = cells_of(found, planned)
    return found.assign(served=[served_by(config, cell) if cell else "" for cell in cells])


def best_for(
    found: pd.DataFrame, config: Mapping[str, Any], planned: Iterable[Cell], target: str, flags: tuple[str, ...]
) -> tuple[Cell, str]:
    """The best recipe of a recommendation that ``target`` can hold, and a line about the best one that
    it cannot hold, if that is better.

    :class:`ConfigError` if it can hold none.
    """
    better = ""
    for cell in filter(None, cells_of(found, planned)):
        verdict = planned_verdict(config, cell, target, flags)
        if not verdict.refusals:
            return cell, better
        better = better or f"better, but not for {target}: {cell_name(cell)} ({verdict.refusals[0]})"
    raise ConfigError(f"TO: {target} can hold none of the {len(found)} recipes within BITS; {better}")
