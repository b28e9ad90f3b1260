"""SmoothQuant (arXiv 2211.10438): fixed scaling by the extremes of activations and weights.

The published LLaMA setting, the default of ``sites``, scales the two norm outputs only; the other
two are an extension. ``search`` finds the best alpha per layer and site (``searched_scale.py``);
the publication tunes it by hand for a whole model.
"""

from __future__ import annotations

from ...schemes.cell_schemes import CellSchemes
from ..primitives.scale import Scale
from ..primitives.searched_scale import SearchedSmoothing


def primitives(
    alpha: float,
    sites: list[str],
    statistic: str = "maximum",
    search: bool = False,
    points: int = 21,
    round_activations: bool = True,
    division: str = "offline",
    seed: int | None = None,
    schemes: CellSchemes | None = None,
) -> list:
    online = division == "online"
    if search:
        searched = SearchedSmoothing(
            sites, points, round_activations, schemes, online=online, alpha=alpha, statistic=statistic
        )
        return [searched]
    return [Scale(alpha, sites, statistic, online=online)]
