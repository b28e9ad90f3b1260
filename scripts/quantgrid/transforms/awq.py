"""AWQ (arXiv 2306.00978): scaling by a power of the mean magnitude, the power searched with rounded weights; optionally clipped weights.

Deviations: the error of the linears' outputs decides, not that of the block behind them (``search_objective.py``). Under grouped queries
the published code skips ``output_input``; here the query heads of a group share a factor. Ranges are clipped for all linears but q and k,
as published, on the second moment in the place of 512 tokens.
"""

from __future__ import annotations

from ..architecture import LINEARS
from ..cell_schemes import CellSchemes
from .searched_clip import SearchedClip
from .searched_scale import SearchedPower


def primitives(sites: list[str], points: int, round_activations: bool, clip: bool, clip_steps: int = 10, seed: int | None = None,
               schemes: CellSchemes | None = None) -> list:
    clipping = [SearchedClip([linear for linear in LINEARS if linear not in ("q", "k")], clip_steps, schemes)] if clip else []
    return [SearchedPower(sites, points, round_activations, schemes), *clipping]
