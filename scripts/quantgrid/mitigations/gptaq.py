"""GPTAQ (arXiv 2504.02692): GPTQ towards the output of the full-precision model, whose input x* the predecessors' errors turned into x.

Beside the error of a rounding, every later column j takes w_i P_ij, P = alpha triu(E[(x* - x) xᵀ] Uᵀ, 1) U with the U of GPTQ. The
statistics have to be paired, so it runs with ``propagation: sequential`` alone. The published code lets a column that is already
rounded stand for w_i beyond its block of 128; here it is the column as it was when its turn came, so that blocks change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..quantizer import QuantScheme
from ..statistics import PairedStatistics
from .compensated import Compensated
from .gptq import solve


def gptaq(weight: Tensor, statistics: PairedStatistics, scheme: QuantScheme, damping: float = 0.01, block_size: int = 128,
          activation_order: bool = False, scales: str = "static", alpha: float = 0.25) -> Compensated:
    """GPTAQ of ``weight`` (*batch, m, n); options as those of GPTQ, ``alpha`` 0.25 as published, 0 is GPTQ.

    Raises :class:`ConfigError` for statistics that are not paired.
    """
    if not isinstance(statistics, PairedStatistics):
        raise ConfigError("GPTAQ needs the inputs of the full-precision model beside those of the quantized one: set propagation to 'sequential'")

    def drift(factor: Tensor, order: Tensor | None) -> Tensor:
        return alpha * drift_of(statistics, factor, order)

    return solve(weight, statistics, scheme, damping, block_size, activation_order, scales, drift)


def drift_of(statistics: PairedStatistics, factor: Tensor, order: Tensor | None) -> Tensor:
    """triu(D Uᵀ, 1) U (*batch, n, n) of the cross moment D, columns in ``order``; what dead inputs should have been counts for nothing."""
    dead = statistics.second_moment.diagonal(dim1=-2, dim2=-1) <= 0
    cross = statistics.cross.to(factor.device, torch.float64).masked_fill(dead.unsqueeze(-2), 0.0).masked_fill(dead.unsqueeze(-1), 0.0)
    if order is not None:
        cross = cross.gather(-2, order.unsqueeze(-1).expand_as(cross)).gather(-1, order.unsqueeze(-2).expand_as(cross))
    upper = factor.double()
    return (torch.triu(cross @ upper.mT, 1) @ upper).float()
