"""GPTQ, then a low-rank term for what GPTQ left: W - Q of the original weight (the paper's combination).

``plain`` is the paper's. It lowers |W - Q|_F and usually, not provably, the output error; ``exact`` never raises the output error
(but for the rounding of its factors to bfloat16) and is an extension.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..quantizer import QuantScheme
from ..statistics import SiteStatistics
from .compensated import Compensated
from .gptq import gptq
from .low_rank import compensation


def gptq_low_rank(weight: Tensor, statistics: SiteStatistics, scheme: QuantScheme, rank: int = 32, metric: str = "plain",
                  **gptq_options: Any) -> Compensated:
    """``weight`` (*batch, m, n) by GPTQ with ``gptq_options``, its remaining error by a term of rank ``rank``."""
    solved = gptq(weight, statistics, scheme, **gptq_options)
    return replace(solved, low_rank=compensation(weight - solved.dequantized(), statistics, rank, metric))
