"""AWQ (arXiv 2306.00978): searched scaling by a power of the mean magnitude, optional clipping.

The search rounds weights. Deviations: the criterion is the output error of the linears, not that of
the block behind them (``search_objective.py``). Under grouped queries the published code skips
``output_input``; here the query heads of a group share a factor. Ranges are clipped for all linears
except q and k, as published, on the second moment instead of 512 tokens.
"""

from __future__ import annotations

from ...models.plans import LINEARS
from ...schemes.cell_schemes import CellSchemes
from ..primitives.searched_clip import SearchedClip
from ..primitives.searched_scale import SearchedPower


def primitives(
    sites: list[str],
    points: int,
    round_activations: bool,
    clip: bool,
    clip_steps: int = 10,
    division: str = "offline",
    seed: int | None = None,
    schemes: CellSchemes | None = None,
) -> list:
    clipping = (
        [SearchedClip([linear for linear in LINEARS if linear not in ("q", "k")], clip_steps, schemes)] if clip else []
    )
    return [SearchedPower(sites, points, round_activations, schemes, online=division == "online"), *clipping]
