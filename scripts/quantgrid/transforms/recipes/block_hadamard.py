"""Block Hadamard rotations I ⊗ H online at every site.

MR-GPTQ and FP-Quant (arXiv 2509.23202), block rotation (arXiv 2511.04214). ``fold_heads`` moves the
one at ``output_input`` into v where that is exact, which FP-Quant does not do. There are no random
signs.
"""

from __future__ import annotations

from ..primitives.block_rotate import BlockHadamard


def primitives(block_size: int, sites: list[str], fold_heads: bool, seed: int | None = None) -> list[BlockHadamard]:
    return [BlockHadamard(block_size, sites, fold_heads)]
