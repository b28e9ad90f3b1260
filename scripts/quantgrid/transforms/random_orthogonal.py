"""Random orthogonal rotations, drawn from the Haar measure, where no structure is needed: R1, and R2 unless ``heads`` is ``hadamard``.

R4 runs online and stays a Hadamard transform. The rotations are those of SpinQuant (arXiv 2405.16406); any hidden size will do.
"""

from __future__ import annotations

from collections.abc import Sequence

from .rotate import RotateDown, RotateHeads, RotateResidual
from .rotate_principal import RotatePrincipal


def primitives(seed: int, rotations: Sequence[str] = ("R1", "R2", "R4"), heads: str = "orthogonal", basis: str = "none") -> list:
    residual = RotateResidual("orthogonal", seed) if basis == "none" else RotatePrincipal("orthogonal", seed, basis)
    made = {"R1": residual, "R2": RotateHeads(seed, heads), "R4": RotateDown()}
    return [primitive for name, primitive in made.items() if name in rotations]
