"""Low rank first (SVDQuant, arXiv 2411.05007): leading part of the weight in 16 bits, rest in
codes.

L starts as the best rank-r approximation of W. Each iteration quantizes W - L, then fits L to W -
Q, as long as the output error falls. SVDQuant smooths activations first (a transform here), feeds
unrounded activations to the branch (``branch_input: unquantized``; the default here is the grid's)
and shares one factor among q, k and v (not done here: every linear has separate factors).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...quantizer.quantized_weight import Compensated
from ...schemes.quant_scheme import QuantScheme
from ..defaults import BRANCH_INPUT, FACTORS, METRIC, RANK, SVDQUANT_ITERATIONS
from ..solvers.alternation import alternate
from ..solvers.factors import stored_term
from .bases import solve_base
from .low_rank import compensated, rank_of, term


def low_rank_first(
    weight: Tensor,
    statistics: SiteStatistics,
    scheme: QuantScheme,
    rank: int | float = RANK,
    metric: str = METRIC,
    factors: str = FACTORS,
    branch_input: str = BRANCH_INPUT,
    base: str = "rtn",
    iterations: int = SVDQUANT_ITERATIONS,
    **base_options: Any,
) -> Compensated:
    """Quantize ``weight`` (*batch, m, n) as a term of rank ``rank`` plus the rest by ``base``.

    The best of at most ``iterations`` iterations is kept. A layer stops after the first iteration
    that does not lower its output error. Rank 0 is ``base`` alone.
    """
    rank, weight = rank_of(rank, weight.shape), weight.float()
    if rank == 0:
        return solve_base(base, weight, statistics, scheme, **base_options)
    left, right, details = term(weight, statistics, rank, metric)
    found = alternate(
        weight,
        statistics,
        lambda rest: solve_base(base, rest, statistics, scheme, **base_options),
        lambda solved: compensated(weight, solved, statistics, rank, metric, factors, branch_input),
        (*stored_term(left, right, weight.double(), factors), details),
        iterations,
        early_stop=True,
    )
    return replace(found, branch_input=branch_input)
