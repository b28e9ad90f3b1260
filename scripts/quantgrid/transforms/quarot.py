"""QuaRot (arXiv 2404.00456): randomized Hadamard R1, I ⊗ H on the values offline, heads mixed online by H ⊗ I, R4 online.

``mixing: hadamard``, as published, needs a Hadamard matrix of order heads; ``orthogonal`` mixes by a Haar matrix instead, for any number of
heads, at heads x heads numbers per layer. Left out: the rotation of queries and keys (a format's ``rotate_keys`` has it) and the subtraction of the
embedding mean, which is not function preserving.
"""

from __future__ import annotations

from .rotate import MixHeads, RotateDown, RotateHeads, RotateResidual


def primitives(seed: int, mixing: str = "hadamard") -> list:
    return [RotateResidual("hadamard", seed), RotateHeads(seed, "plain"), MixHeads(seed, mixing), RotateDown()]
