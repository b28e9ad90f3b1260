"""Features of a cell that decide whether a target can hold it. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..models.shapes import ModelShape
from ..schemes.cell_schemes import CellSchemes


def in_some_layers(operation: str) -> str:
    """Name of an online operation that some layers have and others do not."""
    return f"{operation} in some layers"


@dataclass(frozen=True)
class Features:
    """Schemes, run-time operations and side terms of one cell.

    ``online`` maps kinds of sites to the names of their online operations, ``biased`` lists the kinds
    of linears that have a bias in the cell and none in the architecture's config (shifts fold into
    biases). ``branch_inputs`` are the activations that low-rank terms multiply. ``clips``: learned
    limits of activations. ``shares_global_scale``: the linears of a site have one global scale.
    """

    shape: ModelShape
    schemes: CellSchemes
    online: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    branch_inputs: frozenset[str] = frozenset()
    outliers: bool = False
    biased: tuple[str, ...] = ()
    clips: bool = False
    shares_global_scale: bool = False
