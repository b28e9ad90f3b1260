"""QuaRot (arXiv 2404.00456): randomized Hadamard R1, I ⊗ H on values, head mixing, R4.

The rotation of the values is offline; head mixing H ⊗ I and R4 are online. ``mixing: hadamard``, as
published, needs a Hadamard matrix of order heads; ``orthogonal`` mixes by a Haar matrix instead,
for any number of heads, with heads x heads parameters per layer. Not included: the rotation of
queries and keys (see ``rotate_keys`` of a format) and the subtraction of the embedding mean, which
does not preserve the function.
"""

from __future__ import annotations

from ..primitives.rotate import MixHeads, RotateDown, RotateHeads, RotateResidual


def primitives(seed: int, mixing: str = "hadamard", residual: str = "offline", values: str = "offline") -> list:
    R1 = RotateResidual("hadamard", seed, online=residual == "online")
    return [R1, RotateHeads(seed, "plain", online=values == "online"), MixHeads(seed, mixing), RotateDown()]
