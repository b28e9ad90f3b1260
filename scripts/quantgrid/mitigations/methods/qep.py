"""QEP (NeurIPS 2025): weights corrected for the error of their inputs, then rounded.

x* is the input in the full-precision model, x the input behind quantized predecessors. Before it is
rounded, the weight W becomes W + a W E[(x* - x) xᵀ] (C + d mean(diag C) I)⁻¹, C = E[xxᵀ]: for a = 1
the weight whose output on x is closest to that of W on x*. ``correction`` a is 0.5 and
``correction_damping`` d is 1 as published; the published code leaves out the down projections, which
are corrected here. Scales are those of the corrected weight, but a global scale shared by a site
(``global_scale: site``) is that of the weights before it, so that larger weights saturate. The method
needs paired statistics and so requires ``propagation: sequential``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...calibration.statistics import PairedStatistics, SiteStatistics
from ...ground.errors import ConfigError
from ...quantizer.quantized_weight import Compensated
from ...schemes.quant_scheme import QuantScheme
from ..defaults import BLOCK_SIZE, CORRECTION, CORRECTION_DAMPING, DAMPING, SCALES
from ..solvers.cholesky import damped_cholesky
from .bases import solve_base


def qep(
    weight: Tensor,
    statistics: SiteStatistics,
    scheme: QuantScheme,
    correction: float = CORRECTION,
    correction_damping: float = CORRECTION_DAMPING,
    base: str = "gptq",
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    activation_order: bool = False,
    scales: str = SCALES,
    global_scale: Tensor | None = None,
) -> Compensated:
    """Correct ``weight`` (*batch, m, n) and quantize it by ``base`` (``gptq``, ``mr_gptq`` or
    ``rtn``); without ``correction`` this is the base.

    The other options are those of the base. Raises :class:`ConfigError` for unpaired statistics.
    """
    weight = weight.float()
    if correction:
        weight = weight + correction * (weight.double() @ input_map(statistics, correction_damping)).float()
    return solve_base(
        base, weight, statistics, scheme, damping, block_size, activation_order, scales, global_scale=global_scale
    )


def input_map(statistics: SiteStatistics, damping: float) -> Tensor:
    """D (C + damping mean(diag C) I)⁻¹ (*batch, n, n) of a site, D = E[(x* - x) xᵀ], float64.

    Rows and columns of dead inputs are zero.
    """
    if not isinstance(statistics, PairedStatistics):
        raise ConfigError(
            "QEP needs paired statistics (full-precision and quantized model): set propagation to 'sequential'"
        )

    def solved() -> Tensor:
        lower, _ = damped_cholesky(statistics.second_moment.to(torch.float64, copy=True), damping)
        return torch.cholesky_solve(living_cross(statistics).mT, lower).mT

    return statistics.remembered(("qep", damping), solved)


def living_cross(statistics: PairedStatistics) -> Tensor:
    """D (*batch, n, n) in float64 with the rows and columns of dead inputs zeroed."""
    dead = statistics.second_moment.diagonal(dim1=-2, dim2=-1) <= 0
    cross = statistics.cross.to(statistics.second_moment.device, torch.float64)  # type: ignore[union-attr]
    return cross.masked_fill(dead.unsqueeze(-2), 0.0).masked_fill(dead.unsqueeze(-1), 0.0)
