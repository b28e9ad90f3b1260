"""Random Hadamard rotations at the sites of SpinQuant (arXiv 2405.16406): R1 and R2 offline, R4 online.

No head mixing (QuaRot has it), no subtraction of the embedding mean (it is not function preserving), norm gains absorbed first.
"""

from __future__ import annotations

from .rotate import RotateDown, RotateHeads, RotateResidual


def primitives(seed: int) -> list:
    return [RotateResidual("hadamard", seed), RotateHeads(seed), RotateDown()]
