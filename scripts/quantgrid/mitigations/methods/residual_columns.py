"""Residual columns: a second code for the input channels of largest activations (SERQ, arXiv 2603.08185).

The main codes are those of ``base``. The columns of W with the largest inputs get second codes, of what
rounding to nearest leaves of them, with scales of their own; the linear adds them to its main codes, so
that these columns have about twice the bits. They take the bytes of a bfloat16 term of rank ``rank``,
as sparse outliers do; where the bytes end within a scale group, the last group is shorter. Deviations:
SERQ stores the first code apart and the remainder in the main matrix, which needs scale groups that
hold no other columns; here the main codes come first, so that any granularity works. Its scaling of
inputs is a transform (``scaling`` with ``alpha: 1``).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...quantization.compensation_storage import residual_bits
from ...quantizer.quantized_weight import Compensated, ResidualColumns
from ...quantizer.tensors import quantize
from ...schemes.quant_scheme import QuantScheme
from ..defaults import ORDER, RANK
from .bases import solve_base
from .low_rank import rank_of


def residual_columns(
    weight: Tensor,
    statistics: SiteStatistics,
    scheme: QuantScheme,
    rank: int | float = RANK,
    order: str = ORDER,
    base: str = "rtn",
    global_scale: Tensor | None = None,
    **base_options: Any,
) -> Compensated:
    """Quantize ``weight`` (*batch, m, n) by ``base``, with second codes for the columns of largest inputs.

    ``order``: by ``maximum`` |x_j|, or by ``second_moment`` E[x_j²]. The maximum is that before any
    scaling of channels: SERQ's own makes all of them 1. Behind a mixing of channels it is that of the
    mixed ones. Where the budget does not reach for one column, this is the base. Under another base than
    ``rtn`` the main codes are those of the weight minus the second codes; columns that are rounded first
    (``activation_order``) keep their precision.
    """
    weight = weight.float()
    count = affordable_columns(rank_of(rank, weight.shape), weight.shape, scheme)
    if count == 0:
        return solve_base(base, weight, statistics, scheme, global_scale=global_scale, **base_options)
    nearest = solve_base("rtn", weight, statistics, scheme, global_scale=global_scale)
    columns = magnitudes(statistics, order).topk(count, dim=-1).indices.sort(-1).values
    left = (weight - nearest.weight()).gather(-1, columns.unsqueeze(-2).expand(*weight.shape[:-1], count))
    sizes, schemes = zip(*parts(count, scheme))
    residual = ResidualColumns(tuple(map(quantize, left.split(sizes, -1), schemes)), columns)
    if base == "rtn":
        return replace(nearest, residual=residual)
    rest = weight - residual.added_to(torch.zeros_like(weight))
    return replace(
        solve_base(base, rest, statistics, scheme, global_scale=global_scale, **base_options), residual=residual
    )


def magnitudes(statistics: SiteStatistics, order: str) -> Tensor:
    """Size (*batch, n) of the inputs that orders the columns."""
    if order == "second_moment":
        return statistics.second_moment.diagonal(dim1=-2, dim2=-1)
    return statistics.unscaled_maximum


def parts(count: int, scheme: QuantScheme) -> list[tuple[int, QuantScheme]]:
    """(columns, scheme) of ``count`` residual columns: whole scale groups, and the rest, with one scale per row."""
    alone = scheme.separate
    rest = count % (alone.group_size or 1)
    per_row = replace(alone, granularity="channel", group_size=None) if rest else alone
    return [(size, of) for size, of in ((count - rest, alone), (rest, per_row)) if size]


def affordable_columns(rank: int, shape: torch.Size, scheme: QuantScheme) -> int:
    """Largest number of residual columns of a weight of ``shape`` (*batch, m, n) within the bits of a bfloat16
    term of ``rank``.

    Bits grow with the number of groups, and with the columns of the last one.
    """
    m, n = shape[-2:]
    size, budget = scheme.group_size or 1, 16 * rank * (m + n)

    def most(numbers: range) -> int:
        return numbers[bisect_right(numbers, budget, key=lambda count: residual_bits(m, parts(count, scheme))) - 1]

    whole = most(range(0, n + 1, size))
    return most(range(whole, min(whole + size, n + 1)))
