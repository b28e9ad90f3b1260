"""Atom's reordering (arXiv 2310.19102): channels sorted by magnitude, so that a group holds channels of one size.

Of Atom's mixed precision nothing is here: its 128 largest channels stay in INT8, ours are rounded as all others. With one scale per row or
token an order changes no rounding to the nearest; it acts through groups and through the order in which GPTQ goes.
"""

from __future__ import annotations

from .reorder import Reorder


def primitives(statistic: str, sites: list[str], heads: str, seed: int | None = None) -> list[Reorder]:
    return [Reorder(statistic, sites, heads)]
