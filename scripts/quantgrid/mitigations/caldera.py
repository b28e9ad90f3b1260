"""CALDERA (arXiv 2405.18886): codes of W - L and the low-rank L of W - Q in turns, both against the second moment; the best pair is kept.

The publication rounds by LDLQ, which is GPTQ, takes 20 turns and rounds its factors on a lattice (``factors`` offers other formats).
Its first turn, from L = 0, is GPTQ with the term of ``qera_exact``: the result is never worse than that in the output error.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..quantizer import QuantScheme
from ..statistics import SiteStatistics
from .alternation import alternate
from .bases import solve_base
from .compensated import Compensated
from .low_rank import compensated, rank_of


def caldera(weight: Tensor, statistics: SiteStatistics, scheme: QuantScheme, rank: int | float = 32, factors: str = "bf16",
            branch_input: str = "quantized", base: str = "gptq", iterations: int = 20, **base_options: Any) -> Compensated:
    """``weight`` (*batch, m, n) as codes by ``base`` and a term of rank ``rank``, the best of ``iterations`` turns; at rank 0 ``base``."""
    rank, weight = rank_of(rank, weight.shape), weight.float()
    if rank == 0:
        return solve_base(base, weight, statistics, scheme, **base_options)
    return alternate(weight, statistics, lambda rest: solve_base(base, rest, statistics, scheme, **base_options),
                     lambda solved: compensated(weight, solved, statistics, rank, "qera_exact", factors, branch_input), None, iterations,
                     early_stop=False)
