"""GPTAQ (arXiv 2504.02692): GPTQ towards the output of the full-precision model.

x* is the input in the full-precision model, x the input after quantized predecessors. In addition
to the rounding error, every later column j receives w_i P_ij, P = alpha triu(E[(x* - x) xᵀ] Uᵀ, 1)
U with the U of GPTQ. The method needs paired statistics and so requires ``propagation:
sequential``. Beyond its block of 128 the published code uses the rounded column for w_i; here w_i
is the column just before rounding, so the result does not depend on the block size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...calibration.statistics import PairedStatistics
from ...ground.errors import ConfigError
from ...quantizer.quantized_weight import Compensated
from ...schemes.quant_scheme import QuantScheme
from ..defaults import BLOCK_SIZE, DAMPING, GPTAQ_ALPHA, SCALES
from .gptq import solve


def gptaq(
    weight: Tensor,
    statistics: PairedStatistics,
    scheme: QuantScheme,
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    activation_order: bool = False,
    scales: str = SCALES,
    alpha: float = GPTAQ_ALPHA,
    global_scale: Tensor | None = None,
) -> Compensated:
    """Quantize ``weight`` (*batch, m, n) by GPTAQ; ``alpha`` is 0.25 as published, 0 is GPTQ.

    All other options are those of GPTQ. Raises :class:`ConfigError` for unpaired statistics.
    """
    if not isinstance(statistics, PairedStatistics):
        raise ConfigError(
            "GPTAQ needs paired statistics (full-precision and quantized model): set propagation to 'sequential'"
        )

    def cross_term(factor: Tensor, order: Tensor | None) -> Tensor:
        return alpha * cross_term_of(statistics, factor, order)

    return solve(weight, statistics, scheme, damping, block_size, activation_order, scales, cross_term, global_scale)


def cross_term_of(statistics: PairedStatistics, factor: Tensor, order: Tensor | None) -> Tensor:
    """triu(D Uᵀ, 1) U (*batch, n, n) of the cross moment D, columns in ``order``.

    Rows and columns of dead inputs are zeroed.
    """
    dead = statistics.second_moment.diagonal(dim1=-2, dim2=-1) <= 0
    cross = (
        statistics.cross.to(factor.device, statistics.solver_dtype)
        .masked_fill(dead.unsqueeze(-2), 0.0)
        .masked_fill(dead.unsqueeze(-1), 0.0)
    )
    if order is not None:
        cross = cross.gather(-2, order.unsqueeze(-1).expand_as(cross)).gather(-1, order.unsqueeze(-2).expand_as(cross))
    upper = factor.to(cross.dtype)
    return (torch.triu(cross @ upper.mT, 1) @ upper).float()
