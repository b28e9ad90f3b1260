"""Which transforms the figures of distributions show, and what these figures are called. Standard library only.

``report.distributions`` of a config names transforms; the unchanged model, ``none``, always comes first. Of a name with several seeds the
first is shown. A transform that is fitted to a scheme is shown as fitted for the first quantized cell that has it, in the order of studies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from . import grid
from .architecture import SITES
from .errors import ConfigError
from .grid import Cell

KEY = "report.distributions"
FIGURES = ("kurtosis-inputs", "kurtosis-weights", *(f"{tensor}-{site}" for tensor in ("inputs", "weights") for site in SITES))


def names(config: Mapping[str, Any]) -> list[str]:
    """The transforms to show, seeds settled; empty where the config asks for none."""
    given = config["report"]["distributions"]
    found = [grid.entry_names(config, "transforms", name, KEY)[0] for name in given]
    return list(dict.fromkeys(["none", *found])) if found else []


def shown(config: Mapping[str, Any], cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Model -> for each transform to show a cell that has it; a model of whose cells none has a transform goes without that one.

    Raises :class:`ConfigError` where no model has it.
    """
    wanted, found = names(config), {}
    for cell in sorted(cells, key=lambda cell: not cell.quantized) if wanted else ():
        found.setdefault(cell.model, {}).setdefault(cell.transform, cell)
    for name in wanted:
        if not any(name in of_model for of_model in found.values()):
            raise ConfigError(f"{KEY}: no study has the transform '{name}'; add it to one, or leave it out here")
    return {model: [of_model[name] for name in wanted if name in of_model] for model, of_model in found.items()}
