"""Outlier Suppression+ (arXiv 2304.09145): centred channels, scaled by a searched threshold.

Channels beyond the threshold are scaled down to it. Deviations: on a decoder with RMSNorm the shift
is an extension of quantgrid (``shift.py``; the published LLaMA code omits it) and applies to those
of ``sites`` in ``shifted_sites``; thresholds have geometric steps; the criterion is the output
error of the linears, not that of the block behind them (``search_objective.py``).
"""

from __future__ import annotations

from ...schemes.cell_schemes import CellSchemes
from ..primitives.searched_scale import SearchedThreshold
from ..primitives.shift import Shift


def primitives(
    sites: list[str],
    shifted_sites: list[str],
    center: str,
    points: int,
    lowest: float,
    round_activations: bool,
    division: str = "offline",
    seed: int | None = None,
    schemes: CellSchemes | None = None,
) -> list:
    shift = Shift(center, [site for site in sites if site in shifted_sites])
    return [
        shift,
        SearchedThreshold(sites, points, round_activations, schemes, online=division == "online", lowest=lowest),
    ]
