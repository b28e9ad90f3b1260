"""Shifting alone: centred channels, as in Outlier Suppression+ (arXiv 2304.09145) and OmniQuant.

Both shift before they scale. On a decoder with RMSNorm and SwiGLU this is an extension of
quantgrid: both published codes omit shifting for LLaMA, since no norm bias can hold it. Here the
subtraction runs online at every site except ``output_input`` (``shift.py``).
"""

from __future__ import annotations

from ..primitives.shift import Shift


def primitives(center: str, sites: list[str], seed: int | None = None) -> list[Shift]:
    return [Shift(center, sites)]
