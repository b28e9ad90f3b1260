"""GPTQ, then a low-rank term for what it left: W - Q of the original weight (the combination of arXiv 2507.17417).

``base`` may be any of the GPTQ family: LoRC on top of it. ``plain`` is the paper's metric. It lowers |W - Q|_F and usually, not
provably, the output error; ``qera_exact`` never raises the output error (but for the rounding of its factors) and is an extension.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..quantizer import QuantScheme
from ..statistics import SiteStatistics
from .bases import solve_base
from .compensated import Compensated
from .low_rank import compensated


def gptq_low_rank(weight: Tensor, statistics: SiteStatistics, scheme: QuantScheme, rank: int | float = 32, metric: str = "plain",
                  factors: str = "bf16", branch_input: str = "quantized", base: str = "gptq", **base_options: Any) -> Compensated:
    """``weight`` (*batch, m, n) by ``base`` with ``base_options``, its remaining error by a term of rank ``rank``."""
    solved = solve_base(base, weight, statistics, scheme, **base_options)
    return compensated(weight, solved, statistics, rank, metric, factors, branch_input)
