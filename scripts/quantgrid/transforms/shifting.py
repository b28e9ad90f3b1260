"""Shifting by itself: every channel centred, as Outlier Suppression+ (arXiv 2304.09145) and OmniQuant do before they scale.

On a decoder of RMSNorm and SwiGLU this is our own extension: the published code of both leaves shifting out for LLaMA, since no norm bias
can take it. Here the subtraction runs online at every site but ``output_input`` (``shift.py``).
"""

from __future__ import annotations

from .shift import Shift


def primitives(center: str, sites: list[str], seed: int | None = None) -> list[Shift]:
    return [Shift(center, sites)]
