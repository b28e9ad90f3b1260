"""Random orthogonal rotations from the Haar measure: R1, and R2 unless ``heads`` is ``hadamard``.

The transform R4 runs online and stays a Hadamard transform. The rotations are those of SpinQuant
(arXiv 2405.16406) for any hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..primitives.rotate import RotateDown, RotateHeads, RotateResidual
from ..primitives.rotate_principal import RotatePrincipal


def primitives(
    seed: int,
    rotations: Sequence[str] = ("R1", "R2", "R4"),
    heads: str = "orthogonal",
    basis: str = "none",
    residual: str = "offline",
    values: str = "offline",
) -> list:
    kind, online = "orthogonal", residual == "online"
    R1 = (
        RotateResidual(kind, seed, online=online)
        if basis == "none"
        else RotatePrincipal(kind, seed, basis, online=online)
    )
    made = {"R1": R1, "R2": RotateHeads(seed, heads, online=values == "online"), "R4": RotateDown()}
    return [primitive for name, primitive in made.items() if name in rotations]
