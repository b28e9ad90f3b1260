"""GPTQ plus a low-rank term for its error W - Q (the combination of arXiv 2507.17417).

``base`` may be any method of the GPTQ family, with LoRC on top. ``plain`` is the metric of the
paper: it lowers |W - Q|_F and usually, not provably, the output error. ``qera_exact`` is an
extension that never raises the output error (except by the rounding of its factors).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...quantizer.quantized_weight import Compensated
from ...schemes.quant_scheme import QuantScheme
from ..defaults import BRANCH_INPUT, FACTORS, METRIC, RANK
from .bases import solve_base
from .low_rank import compensated


def gptq_low_rank(
    weight: Tensor,
    statistics: SiteStatistics,
    scheme: QuantScheme,
    rank: int | float = RANK,
    metric: str = METRIC,
    factors: str = FACTORS,
    branch_input: str = BRANCH_INPUT,
    base: str = "gptq",
    **base_options: Any,
) -> Compensated:
    """Quantize ``weight`` (*batch, m, n) by ``base`` and fit a term of rank ``rank`` to its
    error."""
    solved = solve_base(base, weight, statistics, scheme, **base_options)
    return compensated(weight, solved, statistics, rank, metric, factors, branch_input)
