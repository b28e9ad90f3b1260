"""SmoothQuant (arXiv 2211.10438): fixed scaling by the extremes of activations and weights.

The published LLaMA setting scales the two norm outputs only, which is the default of ``sites``; the other two are an extension. ``search``
looks for the best alpha of every layer and site (``searched_scale.py``), which the publication does by hand for a whole model.
"""

from __future__ import annotations

from ..cell_schemes import CellSchemes
from .scale import Scale
from .searched_scale import SearchedSmoothing


def primitives(alpha: float, sites: list[str], statistic: str = "maximum", search: bool = False, points: int = 21, round_activations: bool = True,
               seed: int | None = None, schemes: CellSchemes | None = None) -> list:
    if search:
        return [SearchedSmoothing(sites, points, round_activations, schemes, alpha=alpha, statistic=statistic)]
    return [Scale(alpha, sites, statistic)]
