"""DuQuant (arXiv 2406.01721): scaling, greedy block rotation, zigzag permutation, second rotation.

The scaling is SmoothQuant's; everything else is online at every site. Deviations: rotations and
permutation are estimates from the token sample; rotations are not learned and weights not clipped
(its LWC variant and clip ratios belong to the format); queries and keys are not rotated. The
published code stacks all blocks of a site into one matrix of rows and so finds one rotation for
all, ``shared``; without it each block has a separate rotation, n / block_size times the parameters.
``block_rotations: 1`` leaves out permutation and second rotation: with blocks as large as those of
the format this is DuQuant++ (arXiv 2604.17789, from its abstract and README; we had no access
to its code).
"""

from __future__ import annotations

from ..primitives.block_rotate import GreedyBlocks
from ..primitives.reorder import Zigzag
from ..primitives.scale import Scale


def primitives(
    seed: int,
    alpha: float,
    block_size: int,
    steps: int,
    sites: list[str],
    shared: bool,
    block_rotations: int = 2,
    division: str = "offline",
) -> list:
    first, second = (GreedyBlocks(block_size, sites, steps, seed, stream, shared) for stream in (1, 2))
    scaled = [Scale(alpha, sites, online=division == "online"), first]
    return scaled if block_rotations == 1 else [*scaled, Zigzag(block_size, sites), second]
