"""Transforms shown in the figures of distributions, and the names of these figures. Standard
library only.

``report.distributions`` of a config names transforms; the unchanged model, ``none``, always comes
first. For a name with several seeds the first is shown. A transform fitted to a scheme is shown as
fitted for its first quantized cell, in the order of the studies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..ground.errors import ConfigError
from ..models.plans import SITES
from . import entries
from .cells import Cell

KEY = "report.distributions"
FIGURES = (
    "kurtosis-inputs",
    "kurtosis-weights",
    "trace-excess",
    *(f"{tensor}-{site}" for tensor in ("inputs", "weights") for site in SITES),
)


def names(config: Mapping[str, Any]) -> list[str]:
    """List the transforms to show, seeds resolved; empty if the config names none."""
    given = config["report"]["distributions"]
    found = [entries.entry_names(config, "transforms", name, KEY)[0] for name in given]
    return list(dict.fromkeys(["none", *found])) if found else []


def shown(config: Mapping[str, Any], cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Map each model to a cell per transform to show; transforms that no cell of the model has are
    skipped.

    Raises :class:`ConfigError` if no model has a transform.
    """
    wanted = names(config)
    found: dict[str, dict[str, Cell]] = {}
    for cell in sorted(cells, key=lambda cell: not cell.quantized) if wanted else ():
        found.setdefault(cell.model, {}).setdefault(cell.transform, cell)
    for name in wanted:
        if not any(name in of_model for of_model in found.values()):
            raise ConfigError(f"{KEY}: no study has the transform '{name}'; add it to one, or leave it out here")
    return {model: [of_model[name] for name in wanted if name in of_model] for model, of_model in found.items()}
