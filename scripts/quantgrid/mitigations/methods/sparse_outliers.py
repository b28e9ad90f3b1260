"""Sparse outliers: weights of largest error keep 16 bits, within the budget of a low-rank term.

This is the baseline for a low-rank term of equal size. SpQR (arXiv 2306.03078) and SqueezeLLM
(2306.07629) split off few weights too; they choose them before rounding, by sensitivity. Here they
are chosen after rounding, by the remaining error.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...quantizer.quantized_weight import Compensated, Outliers
from ...schemes.quant_scheme import QuantScheme
from ..defaults import METRIC, RANK
from .bases import solve_base
from .low_rank import column_weights, rank_of

# bits of a kept weight, of its column index, and of the count per row
VALUE_BITS = COLUMN_BITS = ROW_BITS = 16


def sparse_outliers(
    weight: Tensor,
    statistics: SiteStatistics,
    scheme: QuantScheme,
    rank: int | float = RANK,
    metric: str = METRIC,
    base: str = "rtn",
    **base_options: Any,
) -> Compensated:
    """Quantize ``weight`` (*batch, m, n) by ``base`` and keep outliers in 16 bits.

    The outliers take the bytes of a bfloat16 term of rank ``rank``. ``metric`` weights the error of
    column j: ``plain`` by 1, ``lqer`` by E|x_j|, ``qera_approx`` by sqrt(E[x_j²]).
    """
    weight = weight.float()
    solved = solve_base(base, weight, statistics, scheme, **base_options)
    count = affordable(rank_of(rank, weight.shape), weight.shape)
    if count == 0:
        return solved
    error = (weight - solved.dequantized()).abs() * column_weights(statistics, metric).float().unsqueeze(-2)
    positions = error.flatten(-2).topk(count, dim=-1).indices.sort(-1).values
    return replace(solved, outliers=Outliers(weight.flatten(-2).gather(-1, positions).to(torch.bfloat16), positions))


def affordable(rank: int, shape: torch.Size) -> int:
    """Largest number of outliers of a weight of ``shape`` (*batch, m, n) within the budget.

    The budget is the bits of a bfloat16 term of ``rank``; 0 outliers for rank 0.
    """
    m, n = shape[-2:]
    return min(m * n, max(0, 16 * rank * (m + n) - ROW_BITS * m) // (VALUE_BITS + COLUMN_BITS))
