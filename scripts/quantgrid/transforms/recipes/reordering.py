"""Atom's reordering (arXiv 2310.19102): channels sorted by magnitude, for similar ones per group.

Atom's mixed precision is not included: its 128 largest channels stay in INT8, here they are rounded
like all others. With one scale per row or token an order has no effect on rounding to nearest; it
acts through groups and through the column order of GPTQ.
"""

from __future__ import annotations

from ..primitives.reorder import Reorder


def primitives(statistic: str, sites: list[str], heads: str, seed: int | None = None) -> list[Reorder]:
    return [Reorder(statistic, sites, heads)]
