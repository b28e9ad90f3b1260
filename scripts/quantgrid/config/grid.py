"""Grid of cells: expansion of the studies of a config.

A study is a named sub-grid: the product of its axes, plus the products under ``also`` (each states
only the axes that differ), minus the cells that ``exclude`` matches, plus the full-precision
baseline of its models, plus the uniform cells that its allocations are compared with. Standard library
only; this module reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from ..ground.errors import ConfigError
from .allocations import uniform_cells
from .cell_checks import check_cell
from .cells import AXES, FULL_PRECISION, Cell, baseline
from .entries import entry_names, settled
from .races import candidates


def expand_studies(config: Mapping[str, Any]) -> list[Cell]:
    """Expand all studies into distinct cells, in the order of the studies."""
    cells = dict.fromkeys(cell for study in config["studies"] for cell in study_cells(config, study))
    return list(cells)


def study_cells(config: Mapping[str, Any], name: str, valid: bool = False) -> list[Cell]:
    """Expand one study into distinct cells, its baselines first, and of a study with a race only its
    candidates; raises :class:`ConfigError` for an invalid cell.

    ``valid``: the config has been checked, and its cells are not checked again.
    """
    check = (lambda *_: None) if valid else check_cell
    study = config["studies"][name]
    where = f"studies.{name}"
    found = dict.fromkeys(product_cells(config, study, where))
    if not found:
        raise ConfigError(
            f"{where}: the study has no cells; give each of {', '.join(AXES)} at least one value that "
            "'exclude' does not remove"
        )
    for cell in [*found]:
        check(config, cell, where)
        for other in uniform_cells(config, cell):
            if other not in found:
                check(config, other, where)
                found[other] = None
    kept = candidates(config, study["race"], list(found), f"{where}.race") if "race" in study else list(found)
    return list(dict.fromkeys([*(baseline(model) for model in dict.fromkeys(cell.model for cell in kept)), *kept]))


def product_cells(config: Mapping[str, Any], study: Mapping[str, Any], where: str) -> list[Cell]:
    """List the distinct cells of a study's products that it does not exclude, unchecked."""
    found: dict[Cell, None] = {}
    for block in (study, *({**study, **part} for part in study.get("also", []))):
        for cell in _product(config, block, where):
            if not any(_matches(config, cell, pattern, where) for pattern in study.get("exclude", [])):
                found.setdefault(cell)
    return list(found)


def _product(config: Mapping[str, Any], block: Mapping[str, Any], where: str) -> Iterator[Cell]:
    names = [
        [name for given in block.get(axis, ()) for name in entry_names(config, axis, given, f"{where}.{axis}")]
        for axis in AXES
    ]
    for values in product(*names):
        yield _settle(config, Cell(*values))


def names_in(study: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """List (axis, name, key below the study) of every name in a study: on its axes, under ``also``
    and under ``exclude``."""
    for key, block in (("", study), *((f"also.{number}.", part) for number, part in enumerate(study.get("also", [])))):
        yield from ((axis, name, f"{key}{axis}") for axis in AXES for name in block.get(axis, ()))
    for number, pattern in enumerate(study.get("exclude", [])):
        for axis, singular in AXES.items():
            yield from ((axis, name, f"exclude.{number}.{singular}") for name in _listed(pattern.get(singular, [])))


def asked(config: Mapping[str, Any], study: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the ``evaluate`` of a study, by default that of the config."""
    return {**config["evaluate"], **study.get("evaluate", {})}


def _listed(names: str | list[str]) -> list[str]:
    return names if isinstance(names, list) else [names]


def _settle(config: Mapping[str, Any], cell: Cell) -> Cell:
    """Normalize a cell: full precision has no mitigation; ``native`` means the format's block, or
    one scale per channel."""
    if cell.format == FULL_PRECISION:
        return Cell(cell.model, cell.transform, "none", "-", cell.format)
    return replace(cell, granularity=settled(config, cell.granularity, cell.format))


def _matches(config: Mapping[str, Any], cell: Cell, pattern: Mapping[str, Any], where: str) -> bool:
    """Check whether ``cell`` has one of the values of ``pattern`` on every axis that it names."""
    for key, wanted in pattern.items():
        axis = next(plural for plural, singular in AXES.items() if singular == key)
        values = [name for value in _listed(wanted) for name in entry_names(config, axis, value, f"{where}.exclude")]
        if axis == "granularities":
            values = [settled(config, name, cell.format) for name in values]
        if getattr(cell, key) not in values:
            return False
    return True
