"""Low rank first (SVDQuant, arXiv 2411.05007): the leading part of the weight into 16 bits, the rest into codes.

L starts as the best rank-r approximation of W; codes are made of W - L, then L of W - Q, as long as the output error falls. SVDQuant
smooths activations before (a transform here), feeds the branch unrounded activations (``branch_input: unquantized``; the default here
is the grid's) and lets q, k and v share one factor (not done here: every linear has its own).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..quantizer import QuantScheme
from ..statistics import SiteStatistics
from .alternation import alternate
from .bases import solve_base
from .compensated import Compensated
from .factors import stored_term
from .low_rank import compensated, rank_of, term


def low_rank_first(weight: Tensor, statistics: SiteStatistics, scheme: QuantScheme, rank: int | float = 32, metric: str = "plain",
                   factors: str = "bf16", branch_input: str = "quantized", base: str = "rtn", iterations: int = 100,
                   **base_options: Any) -> Compensated:
    """``weight`` (*batch, m, n) as a term of rank ``rank`` and the rest by ``base``; at most ``iterations`` turns, the best one is kept.

    A layer stops after the first turn that did not lower its output error. At rank 0 it is ``base``.
    """
    rank, weight = rank_of(rank, weight.shape), weight.float()
    if rank == 0:
        return solve_base(base, weight, statistics, scheme, **base_options)
    left, right, details = term(weight, statistics, rank, metric)
    found = alternate(weight, statistics, lambda rest: solve_base(base, rest, statistics, scheme, **base_options),
                      lambda solved: compensated(weight, solved, statistics, rank, metric, factors, branch_input),
                      (*stored_term(left, right, weight.double(), factors), details), iterations, early_stop=True)
    return replace(found, branch_input=branch_input)
