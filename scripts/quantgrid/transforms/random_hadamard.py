"""Random Hadamard rotations at the sites of SpinQuant (arXiv 2405.16406): R1 and R2 offline, R4 online.

No head mixing (QuaRot has it), no subtraction of the embedding mean (it is not function preserving), norm gains absorbed first.
``rotations`` turns each of them on; ``basis`` lets R1 start from principal axes (``rotate_principal.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from .rotate import RotateDown, RotateHeads, RotateResidual
from .rotate_principal import RotatePrincipal


def primitives(seed: int, rotations: Sequence[str] = ("R1", "R2", "R4"), basis: str = "none") -> list:
    residual = RotateResidual("hadamard", seed) if basis == "none" else RotatePrincipal("hadamard", seed, basis)
    made = {"R1": residual, "R2": RotateHeads(seed), "R4": RotateDown()}
    return [primitive for name, primitive in made.items() if name in rotations]
