"""DuQuant (arXiv 2406.01721): SmoothQuant scaling, a greedy block rotation, the zigzag permutation, a second block rotation; all but the
scaling online at every site.

Deviations: rotations and permutation come from the token sample, so they are estimates; the rotations are not learned and weights not
clipped (its LWC variant and clip ratios belong to the format); queries and keys are not rotated. The published code folds all blocks of a
site into one matrix of rows and so finds one rotation for them all, ``shared``; without it every block has its own, n / block_size times
the parameters.
"""

from __future__ import annotations

from .block_rotate import GreedyBlocks
from .reorder import Zigzag
from .scale import Scale


def primitives(seed: int, alpha: float, block_size: int, steps: int, sites: list[str], shared: bool) -> list:
    rotations = [GreedyBlocks(block_size, sites, steps, seed, stream, shared) for stream in (1, 2)]
    return [Scale(alpha, sites), rotations[0], Zigzag(block_size, sites), rotations[1]]
