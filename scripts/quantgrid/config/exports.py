"""Exports that a config asks for: entries of the key ``exports``, one export for each target. Standard
library only.

An entry is ``{model, cell, to, flags}``; instead of ``cell``, the name of a cell of that model, it may
state the other axes. The cell is one of the studies. Targets that cannot hold it are refused while the
workflow is planned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..ground.errors import ConfigError, unknown_name
from . import entries, grid
from .cells import AXES, Cell
from .mistakes import collected
from .planned_features import planned_verdict

NEAR = 3  # similar names in a message
_AXES = tuple(axis for axis in AXES.values() if axis != "model")


@dataclass(frozen=True)
class Export:
    """One cell for one target, with the ``flags`` of the target; ``name`` of the folder on its card."""

    cell: Cell
    target: str
    flags: tuple[str, ...] = ()
    name: str = ""


def cell_name(cell: Cell) -> str:
    """Name of a cell among those of its model: ``transform/mitigation/granularity/format``."""
    return "/".join(getattr(cell, axis) for axis in _AXES)


def exports(config: Mapping[str, Any], cells: Iterable[Cell]) -> list[Export]:
    """List the exports of a config whose studies have these ``cells``.

    Raises :class:`ConfigError` for an entry that names no cell, an unknown target or flag, or a target
    that cannot hold its cell.
    """
    known = list(cells)
    found = [
        export
        for number, entry in enumerate(config.get("exports", ()))
        for export in _of_entry(config, entry, f"exports.{number}", known)
    ]
    return list(dict.fromkeys(found))


def export_mistakes(config: Mapping[str, Any]) -> Iterator[str]:
    """List mistakes in the entries of ``exports``, one line each, after the studies were checked."""
    if not config.get("exports"):
        return
    cells = grid.expand_studies(config)
    for number, entry in enumerate(config["exports"]):
        yield from collected(
            lambda number=number, entry=entry: list(_of_entry(config, entry, f"exports.{number}", cells))
        )


def _of_entry(config: Mapping[str, Any], entry: Mapping[str, Any], where: str, cells: list[Cell]) -> Iterator[Export]:
    cell = _cell(config, entry, where, cells)
    flags = tuple(entry.get("flags", ()))
    for target in [entry["to"]] if isinstance(entry["to"], str) else entry["to"]:
        require_exportable(config, cell, target, flags, where)
        yield Export(cell, target, flags, entry.get("name", f"{cell.model}-{cell.format}-{target}"))


def require_exportable(config: Mapping[str, Any], cell: Cell, target: str, flags: tuple[str, ...], where: str) -> None:
    """Raise :class:`ConfigError`, with the reasons, if a target cannot hold a cell."""
    try:
        verdict = planned_verdict(config, cell, target, flags)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if verdict.refusals:
        raise ConfigError(f"{where}: {target} cannot hold '{cell_name(cell)}': {'; '.join(verdict.refusals)}")


def _cell(config: Mapping[str, Any], entry: Mapping[str, Any], where: str, cells: list[Cell]) -> Cell:
    model, stated = entry["model"], {axis: entry[axis] for axis in _AXES if axis in entry}
    if model not in config["models"]:
        raise ConfigError(f"{where}.model: {unknown_name('model', model, config['models'])}")
    if ("cell" in entry) == bool(stated):
        raise ConfigError(f"{where}: name the cell by 'cell' or by its axes ({', '.join(_AXES)}), one of both")
    own = [cell for cell in cells if cell.model == model]
    if "cell" in entry:
        return named_cell(own, entry["cell"], f"{where}.cell")
    for axis in (axis for axis in _AXES if axis not in stated):
        if len(values := {getattr(cell, axis) for cell in own if _has(config, cell, stated)}) > 1:
            raise ConfigError(
                f"{where}: several cells of '{model}' differ in {axis}: {', '.join(sorted(values))}; name one"
            )
    found = [cell for cell in own if _has(config, cell, stated)]
    if not found:
        raise ConfigError(
            f"{where}: no study has a cell of '{model}' with "
            f"{', '.join(f'{axis} {value}' for axis, value in stated.items())}{_near('/'.join(stated.values()), own)}"
        )
    return found[0]


def _has(config: Mapping[str, Any], cell: Cell, stated: Mapping[str, str]) -> bool:
    return all(
        getattr(cell, axis) == (entries.settled(config, value, cell.format) if axis == "granularity" else value)
        for axis, value in stated.items()
    )


def named_cell(cells: list[Cell], name: str, where: str) -> Cell:
    """Find the cell of this name, with or without its model; :class:`ConfigError` names similar ones."""
    for cell in cells:
        if name.strip() in (cell_name(cell), cell.path):
            return cell
    raise ConfigError(f"{where}: unknown cell '{name}'{_near(name, cells)}")


def _near(name: str, cells: list[Cell]) -> str:
    """End of a message: names of quantized cells similar to ``name``, and the number of all cells."""
    names = [cell_name(cell) for cell in cells if cell.quantized]
    near = get_close_matches(name, names, n=NEAR, cutoff=0.0)
    return f"; similar: {', '.join(near)} (the studies have {len(cells)} cells of this model)" if near else ""
