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

from dataclasses import replace

import torch
from torch import Tensor

from ...calibration.statistics import PairedStatistics, SiteStatistics
from ...ground.errors import ConfigError
from ...quantizer.quantized_weight import Compensated
from ...schemes.quant_scheme import QuantScheme
from ..defaults import BLOCK_SIZE, CORRECTION, CORRECTION_DAMPING, DAMPING, SCALES
from ..solvers.cholesky import damped_cholesky
from ..solvers.precision import checked, distance, probes, recorded
from .bases import solve_base
from .gptq import living_moment


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
    weight, details = weight.float(), {}
    if correction:
        (change, used), dtype = input_map(statistics, correction_damping)
        weight = weight + correction * (weight.to(change.dtype) @ change).float()
        details = {"correction_damping": used.flatten().tolist()}
        details |= recorded("correction_dtype", statistics.solver_dtype, [dtype] * used.numel())
    solved = solve_base(
        base, weight, statistics, scheme, damping, block_size, activation_order, scales, global_scale=global_scale
    )
    return replace(solved, details=solved.details | details)


def input_map(statistics: SiteStatistics, damping: float) -> tuple[tuple[Tensor, Tensor], str]:
    """D (C + damping mean(diag C) I)⁻¹ (*batch, n, n) of a site, D = E[(x* - x) xᵀ], with the damping that was
    needed (*batch,), and its dtype.

    Columns of dead inputs are zero, and the mean is that of the living ones.
    """
    if not isinstance(statistics, PairedStatistics):
        raise ConfigError(
            "QEP needs paired statistics (full-precision and quantized model): set propagation to 'sequential'"
        )

    def solved(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        damped = living_moment(
            statistics, statistics.second_moment.new_zeros(statistics.second_moment.shape[:-2]), dtype
        )
        lower, used = damped_cholesky(damped, damping)
        return torch.cholesky_solve(cross_of(statistics, dtype).mT, lower).mT, used, damped

    def error(found: tuple[Tensor, Tensor, Tensor]) -> float:
        change, _, damped = found
        x = probes(damped)
        return distance(change @ (damped @ x), cross_of(statistics, change.dtype) @ x)

    def checked_map() -> tuple[tuple[Tensor, Tensor], str]:
        (change, used, _), dtype = checked(statistics.solver_dtype, solved, error)
        return (change, used), dtype

    return statistics.remembered(("qep", damping), checked_map)


def cross_of(statistics: PairedStatistics, dtype: torch.dtype) -> Tensor:
    """D (*batch, n, n) in ``dtype`` with the columns of dead inputs zeroed.

    Their rows stay: x_j may be zero for all tokens where x*_j is not, and what x*_j gives is then missing
    from the output.
    """
    dead = statistics.second_moment.diagonal(dim1=-2, dim2=-1) <= 0
    cross = statistics.cross.to(statistics.second_moment.device, dtype)  # type: ignore[union-attr]
    return cross.masked_fill(dead.unsqueeze(-2), 0.0)
