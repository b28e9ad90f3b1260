"""Qronos (arXiv 2505.11695): codes that minimize the output error on the inputs that a linear really has.

x* is the input in the full-precision model, x the input behind quantized predecessors, C = E[xxᵀ] and
G = E[x* xᵀ]. The first column is rounded to the best value with the later columns as they are; these
then become the least-squares optimum of what is left, V = (W G - q₁ C₁) C⁻¹ over the later columns,
and GPTQ rounds V under C (the published efficient form). Without a difference of the inputs this is
GPTQ. With strongly correlated inputs the error of the output can be above that of QEP in full. Damping is
relative to the mean of the diagonal, as in GPTQ; the published one is relative to the largest eigenvalue. Where C
without its first column needs more damping, ``correction_damping`` of the details is not zero. Scales are
static, of the uncorrected weight. The method needs paired statistics and so requires ``propagation:
sequential``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...calibration.statistics import PairedStatistics, SiteStatistics
from ...ground.errors import ConfigError
from ...quantizer.quantized_weight import Compensated
from ...schemes.quant_scheme import QuantScheme
from ..defaults import BLOCK_SIZE, DAMPING, SCALES
from ..solvers.cholesky import damped_cholesky
from ..solvers.columns import Columns
from ..solvers.precision import checked, distance, probes, recorded
from .gptq import living_moment, permuted, solve
from .qep import cross_of


def qronos(
    weight: Tensor,
    statistics: SiteStatistics,
    scheme: QuantScheme,
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    activation_order: bool = True,
    global_scale: Tensor | None = None,
) -> Compensated:
    """Quantize ``weight`` (*batch, m, n) by Qronos; the options are those of GPTQ.

    Raises :class:`ConfigError` for unpaired statistics.
    """
    if not isinstance(statistics, PairedStatistics):
        raise ConfigError(
            "Qronos needs paired statistics (full-precision and quantized model): set propagation to 'sequential'"
        )

    details: dict[str, list[Any]] = {}

    def corrected(columns: Tensor, used: Columns, order: Tensor | None, damped: Tensor) -> Tensor:
        def moments(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            moment, cross = living_moment(statistics, damped, dtype), cross_of(statistics, dtype)
            if order is not None:
                moment, cross = _in_order(moment, order), _in_order(cross, order)
            return moment, cross, *damped_cholesky(moment[..., 1:, 1:].clone(), 0.0)

        (moment, cross, lower, more), dtype = statistics.remembered(
            ("qronos", damping, activation_order), lambda: checked(statistics.solver_dtype, moments, _solving_error)
        )
        details["correction_damping"] = more.flatten().tolist()
        details.update(recorded("correction_dtype", statistics.solver_dtype, [dtype] * more.numel()))
        original = weight.float().mT if order is None else permuted(weight.float().mT, order)
        change = cross.mT @ original.to(cross.dtype)
        return first_column(columns, used, moment, change, lower)

    solved = solve(
        weight,
        statistics,
        scheme,
        damping,
        block_size,
        activation_order,
        SCALES,
        global_scale=global_scale,
        corrected=corrected,
    )
    return replace(solved, details=solved.details | details)


def _solving_error(found: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """Relative error of H⁻¹ H x from random x, H the moment without its first row and column."""
    moment, _, lower, _ = found
    rest = moment[..., 1:, 1:]
    x = probes(rest)
    return distance(torch.cholesky_solve(rest @ x, lower), x)


def first_column(columns: Tensor, used: Columns, moment: Tensor, change: Tensor, lower: Tensor) -> Tensor:
    """``columns`` (*batch, n, m) with the first rounded and the others optimal for it.

    ``moment`` (*batch, n, n) is C and ``change`` (*batch, n, m) the transpose of W E[(x* - x) xᵀ], in float64
    or float32, ``lower`` the Cholesky factor of C without its first row and column.
    """
    wide = columns.to(moment.dtype)
    wanted = moment @ wide + change  # (W G)ᵀ
    rest = (moment[..., 1:, :1] * wide[..., 1:, :]).sum(-2)
    best = (wanted[..., 0, :] - rest) / moment[..., 0, :1]
    first = used.rounded(best.float(), 0).unsqueeze(-2)
    left = wanted[..., 1:, :] - moment[..., 1:, :1] * first.to(moment.dtype)
    later = torch.cholesky_solve(left, lower)
    return torch.cat([first, later.float()], -2)


def _in_order(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of ``matrix`` (*batch, n, n) in ``order`` (*batch, n)."""
    rows = matrix.gather(-2, order.unsqueeze(-1).expand_as(matrix))
    return rows.gather(-1, order.unsqueeze(-2).expand_as(matrix))
