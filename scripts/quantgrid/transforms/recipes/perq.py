"""PeRQ (arXiv 2601.22347): R1 and R2 offline, R4 in blocks behind a permutation that spreads the mass.

The worst case after a block Hadamard is smallest where all blocks have the same sum of mean
magnitudes. The permutation of ``down_input`` is offline, in the rows of gate and up. Deviations: the
rule of the greedy permutation is ours (``reorder.py``), since we had no access to the published one: each
channel, by falling mean magnitude, to the block with the least sum that has room, and no permutation
where that does not lower the largest sum; R1 and R2 are random Hadamard rotations.
"""

from __future__ import annotations

from ..primitives.block_rotate import BlockHadamard
from ..primitives.reorder import Spread
from . import random_hadamard


def primitives(seed: int, block_size: int, order: str, residual: str = "offline", values: str = "offline") -> list:
    rotations = random_hadamard.primitives(seed, ("R1", "R2"), residual=residual, values=values)
    spread = [] if order == "none" else [Spread(block_size, ["down_input"], order)]
    return [*rotations, *spread, BlockHadamard(block_size, ["down_input"], False)]
