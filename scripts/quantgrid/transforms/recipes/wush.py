"""WUSH (arXiv 2512.00956): closed-form blocks that balance inputs and weights, online at every site.

Deviations: the second moment of a block is that of its inputs alone, while the published code takes
the diagonal block of the Cholesky factor of all inputs, which is the moment given the columns before
it; and the transform does not know which weights a mitigation has already changed. Queries, keys and
values share one transform, as gate and up do ("fused" in the published code).
"""

from __future__ import annotations

from ..primitives.balanced_blocks import BalancedBlocks


def primitives(
    block_size: int, sites: list[str], hadamard: bool, damping: float, seed: int | None = None
) -> list[BalancedBlocks]:
    return [BalancedBlocks(block_size, sites, hadamard, damping)]
