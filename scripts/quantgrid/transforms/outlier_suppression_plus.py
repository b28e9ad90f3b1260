"""Outlier Suppression+ (arXiv 2304.09145): channels centred, then those beyond a threshold scaled down to it, the threshold searched.

Deviations: on a decoder of RMSNorm the shift is our own extension (``shift.py``; the published LLaMA code leaves it out) and takes those of
``sites`` that are ``shifted_sites``; thresholds are in geometric steps; the error of the linears' outputs decides, not that of the block
behind them (``search_objective.py``).
"""

from __future__ import annotations

from ..cell_schemes import CellSchemes
from .searched_scale import SearchedThreshold
from .shift import Shift


def primitives(sites: list[str], shifted_sites: list[str], center: str, points: int, lowest: float, round_activations: bool, seed: int | None = None,
               schemes: CellSchemes | None = None) -> list:
    shift = Shift(center, [site for site in sites if site in shifted_sites])
    return [shift, SearchedThreshold(sites, points, round_activations, schemes, lowest=lowest)]
