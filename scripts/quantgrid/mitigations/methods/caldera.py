"""CALDERA (arXiv 2405.18886): alternate between codes of W - L and a low-rank L of W - Q.

Both steps minimize the output error under the second moment; the best pair is kept. The publication
rounds by LDLQ, which is GPTQ, takes 20 iterations and rounds its factors on a lattice (``factors``
offers other formats). The first iteration, from L = 0, is GPTQ with the term of ``qera_exact``: the
output error of the result is never larger than that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...quantizer.quantized_weight import Compensated
from ...schemes.quant_scheme import QuantScheme
from ..defaults import BRANCH_INPUT, CALDERA_ITERATIONS, FACTORS, RANK
from ..solvers.alternation import alternate
from .bases import solve_base
from .low_rank import compensated, rank_of


def caldera(
    weight: Tensor,
    statistics: SiteStatistics,
    scheme: QuantScheme,
    rank: int | float = RANK,
    factors: str = FACTORS,
    branch_input: str = BRANCH_INPUT,
    base: str = "gptq",
    iterations: int = CALDERA_ITERATIONS,
    **base_options: Any,
) -> Compensated:
    """Quantize ``weight`` (*batch, m, n) to codes by ``base`` plus a term of rank ``rank``.

    The best of ``iterations`` iterations is kept. Rank 0 is ``base`` alone.
    """
    rank, weight = rank_of(rank, weight.shape), weight.float()
    if rank == 0:
        return solve_base(base, weight, statistics, scheme, **base_options)
    return alternate(
        weight,
        statistics,
        lambda rest: solve_base(base, rest, statistics, scheme, **base_options),
        lambda solved: compensated(weight, solved, statistics, rank, "qera_exact", factors, branch_input),
        None,
        iterations,
        early_stop=False,
    )
