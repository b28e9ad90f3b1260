"""Cells of the grid and the names of its axes. Standard library only.

A cell is one point (model, transform, mitigation, granularity, format).
"""

from __future__ import annotations

from dataclasses import dataclass

AXES = {
    "models": "model",
    "transforms": "transform",
    "mitigations": "mitigation",
    "granularities": "granularity",
    "formats": "format",
}
FULL_PRECISION = "bf16"
MIXED = "mixed"  # granularity of a cell whose linears have several schemes


@dataclass(frozen=True, order=True)
class Cell:
    """One point of the grid; every value is the name of a config entry or of a preset."""

    model: str
    transform: str
    mitigation: str
    granularity: str
    format: str

    @property
    def axes(self) -> dict[str, str]:
        return {**vars(self)}

    @property
    def path(self) -> str:
        return "/".join(vars(self).values())

    @property
    def quantized(self) -> bool:
        return self.mitigation != "none"


def baseline(model: str) -> Cell:
    """The full-precision cell of a model, the same in every study."""
    return Cell(model, "none", "none", "-", FULL_PRECISION)
