"""Folding of norm gains into the linears: the first step of R1 (QuaRot, arXiv 2404.00456) alone."""

from __future__ import annotations

from ..primitives.norms import FoldNorms


def primitives(seed: int | None = None) -> list:
    return [FoldNorms()]
