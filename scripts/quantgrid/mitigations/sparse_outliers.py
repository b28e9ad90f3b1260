"""Sparse outliers: the weights of largest error keep 16 bits, as many as fit into the bytes of a low-rank term.

The alternative that a low-rank term has to beat at its own budget; splitting off few weights is the idea of SpQR (arXiv 2306.03078) and
SqueezeLLM (2306.07629), which choose them before rounding, by sensitivity. Here they are chosen after it, by the error that is left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..quantizer import QuantScheme
from ..statistics import SiteStatistics
from .bases import solve_base
from .compensated import Compensated, Outliers
from .low_rank import column_weights, rank_of

VALUE_BITS = COLUMN_BITS = ROW_BITS = 16  # of a kept weight, of its column, and of the count of every row


def sparse_outliers(weight: Tensor, statistics: SiteStatistics, scheme: QuantScheme, rank: int | float = 32, metric: str = "plain",
                    base: str = "rtn", **base_options: Any) -> Compensated:
    """``weight`` (*batch, m, n) by ``base`` with ``base_options``; outliers for the bytes of a bfloat16 term of rank ``rank``.

    ``metric`` weighs the error of column j: ``plain`` by 1, ``lqer`` by E|x_j|, ``qera_approx`` by sqrt(E[x_j²]).
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
    """How many outliers of a weight of ``shape`` (*batch, m, n) take at most the bits of a bfloat16 term of ``rank``; 0 for rank 0."""
    m, n = shape[-2:]
    return min(m * n, max(0, 16 * rank * (m + n) - ROW_BITS * m) // (VALUE_BITS + COLUMN_BITS))
