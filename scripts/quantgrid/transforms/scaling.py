"""SmoothQuant (arXiv 2211.10438): fixed scaling by the extremes of activations and weights.

The published LLaMA setting scales the two norm outputs only, which is the default of ``sites``; the other two are an extension.
"""

from __future__ import annotations

from .scale import Scale


def primitives(alpha: float, sites: list[str], seed: int | None = None) -> list[Scale]:
    return [Scale(alpha, sites)]
