"""GPTQ (arXiv 2210.17323): round column by column, compensating each error in later columns.

With H = E[xxᵀ] + damping * mean(diag) I and U upper triangular, UᵀU = H⁻¹, column i leaves the
error e_i = (w_i - q_i) / U_ii, and every later column j becomes w_j - e_i U_ij. The sum of |e_i|²
is tr((Q - W) H (Q - W)ᵀ). ``columns.py`` implements the recursion. Scales are static by default.
The published code updates scales per group but reads them from a copy without the errors made in
the same block; ``running`` scales include all errors made so far.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...ground.errors import ConfigError, NumericalFailure
from ...quantizer.quantized_weight import Compensated
from ...quantizer.tensors import quantize
from ...schemes.quant_scheme import QuantScheme
from ..defaults import BLOCK_SIZE, DAMPING, SCALES
from ..solvers.cholesky import damped_cholesky
from ..solvers.columns import Columns, Sweep
from ..solvers.precision import checked, distance, probes, recorded

LARGEST_SOLVED = 96  # order up to which a triangular solve is faster than splitting


def inverse_factor(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(U, damping used): upper triangular U (*batch, n, n), UᵀU = (C + damping * mean(diag C) I)⁻¹.

    U has the dtype of ``moment`` C, float64 or float32 (:func:`.cholesky.damped_cholesky`).

    One Cholesky factorization with rows and columns reversed gives H = V Vᵀ with V upper
    triangular, and U = V⁻¹. For a large site each of these matrices takes half a GB, so each is
    freed once the next one exists.
    """
    moment = moment.flip(-1, -2)
    upper, used = damped_cholesky(moment, damping)
    del moment
    upper = upper.flip(-1, -2)
    return invert_upper(upper), used


def invert_upper(upper: Tensor) -> Tensor:
    """Inverse of upper triangular (*batch, n, n): invert both halves, then the corner by two
    products."""
    n = upper.shape[-1]
    if n <= LARGEST_SOLVED:
        return torch.linalg.solve_triangular(
            upper, torch.eye(n, dtype=upper.dtype, device=upper.device).expand_as(upper), upper=True
        )
    first, second = slice(None, n // 2), slice(n // 2, None)
    inverse = torch.zeros_like(upper)
    inverse[..., first, first] = invert_upper(upper[..., first, first])
    inverse[..., second, second] = invert_upper(upper[..., second, second])
    inverse[..., first, second] = -inverse[..., first, first] @ upper[..., first, second] @ inverse[..., second, second]
    return inverse


def gptq(
    weight: Tensor,
    statistics: SiteStatistics,
    scheme: QuantScheme,
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    activation_order: bool = False,
    scales: str = SCALES,
    global_scale: Tensor | None = None,
) -> Compensated:
    """Quantize ``weight`` (*batch, m, n) by GPTQ with the second moment (*batch, n, n) of its
    input.

    ``damping`` is relative to the mean of the diagonal. ``activation_order`` rounds columns of
    large E[x_j²] first; groups and scales keep their positions (static groups). ``scales``:
    ``static`` computes all scales from the weight before the first rounding; ``running`` computes
    those of a group from its updated columns when the group is reached. ``running`` excludes
    ``activation_order``, under which groups are not contiguous. Columns with an input that is
    always zero are set to zero, as published. ``global_scale`` (*batch, 1, 1) is that of a scheme
    which shares it by site.
    """
    return solve(weight, statistics, scheme, damping, block_size, activation_order, scales, global_scale=global_scale)


def solve(
    weight: Tensor,
    statistics: SiteStatistics,
    scheme: QuantScheme,
    damping: float,
    block_size: int,
    activation_order: bool,
    scales: str,
    cross_term: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    global_scale: Tensor | None = None,
    corrected: Callable[[Tensor, Columns, Tensor | None, Tensor], Tensor] | None = None,
) -> Compensated:
    """Quantize as :func:`gptq`; ``cross_term`` computes the P (*batch, n, n) of GPTAQ from (U,
    order), ``corrected`` other columns (*batch, n, m) from (columns, their parameters, order, damping
    used) once the scales are known."""
    if activation_order and scales == "running":
        raise ConfigError(
            "GPTQ: scales 'running' contradicts activation_order, which splits the groups; use scales 'static'"
        )
    weight = weight.float()
    diagonal = statistics.second_moment.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    weight = weight.masked_fill(dead.unsqueeze(-2), 0.0)
    found = used = Columns.of(weight, scheme, scales == "running", global_scale)
    columns = weight.mT.contiguous()
    order = diagonal.argsort(dim=-1, descending=True, stable=True) if activation_order else None
    if order is not None:
        columns, used = permuted(columns, order), used.changed(lambda x: permuted(x, order))
    factor, damped, dtypes = statistics.remembered(
        ("gptq", damping, activation_order), lambda: _site_factor(statistics, dead, order, damping)
    )
    if corrected is not None:
        columns = corrected(columns, used, order, damped)
    Sweep(columns, factor, used, None if cross_term is None else cross_term(factor, order)).run(block_size)
    if order is not None:
        columns = permuted(columns, order.argsort(-1))
    if not torch.isfinite(columns).all():
        raise NumericalFailure("GPTQ: the rounded weight holds NaN or infinity")
    details = {"damping": damped.flatten().tolist(), **recorded("factor_dtype", statistics.solver_dtype, dtypes)}
    return Compensated(quantize(columns.mT, scheme, found.parameters), details=details)


def _site_factor(
    statistics: SiteStatistics, dead: Tensor, order: Tensor | None, damping: float
) -> tuple[Tensor, Tensor, list[str]]:
    """:func:`inverse_factor` of a site, rounded to float32, columns in ``order``, and the dtype of each.

    A dead column gets the mean diagonal entry, so that it does not change the damping of the others
    (the published code uses 1, with sums over all tokens).

    Matrices are processed one at a time to stay in the cache.
    """
    moments = statistics.second_moment
    n = moments.shape[-1]
    orders = [slice(None)] * (moments.numel() // n**2) if order is None else order.reshape(-1, n)
    factors, dtypes = [], []
    for moment, unseen, columns in zip(moments.reshape(-1, n, n), dead.reshape(-1, n), orders):
        (factor, used), dtype = _checked_factor(moment, unseen, columns, damping, statistics.solver_dtype)
        factors.append((factor.float(), used))
        dtypes.append(dtype)
    factor, used = (torch.stack(parts) for parts in zip(*factors))
    return factor.reshape(moments.shape), used.reshape(moments.shape[:-2]), dtypes


def _checked_factor(
    moment: Tensor, unseen: Tensor, columns: Tensor | slice, damping: float, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], str]:
    """:func:`inverse_factor` of one living moment, and the dtype that it took (:func:`.precision.checked`)."""

    def living(dtype: torch.dtype) -> Tensor:
        return _living(moment, unseen, dtype)[columns][:, columns]

    return checked(
        dtype,
        lambda used: inverse_factor(living(used), damping),
        lambda found: _inversion_error(*found, living(found[0].dtype)),
    )


def _inversion_error(factor: Tensor, damping: Tensor, moment: Tensor) -> float:
    """Relative error of Uᵀ U H x from random x, H = ``moment`` + ``damping`` mean(diag) I, U ``factor``
    (n, n)."""
    x = probes(moment)
    images = moment @ x + (damping * moment.diagonal().mean()).to(x) * x
    return distance(factor.mT @ (factor @ images), x)


def living_moment(statistics: SiteStatistics, damped: Tensor, dtype: torch.dtype) -> Tensor:
    """Second moment (*batch, n, n) in ``dtype`` as :func:`solve` factorizes it: dead inputs with the mean
    diagonal entry, plus ``damped`` (*batch) times that mean."""
    moments = statistics.second_moment
    n = moments.shape[-1]
    dead = moments.diagonal(dim1=-2, dim2=-1) <= 0
    found = torch.stack([_living(*pair, dtype) for pair in zip(moments.reshape(-1, n, n), dead.reshape(-1, n))])
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    diagonal += damped.reshape(-1, 1) * diagonal.mean(-1, keepdim=True)
    return found.reshape(moments.shape)


def _living(moment: Tensor, unseen: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy of ``moment`` (n, n) in ``dtype``; ``unseen`` columns (n,) get the mean of the other diagonal
    entries."""
    moment = moment.to(dtype, copy=True)
    living = moment.diagonal()[~unseen]
    moment.diagonal().masked_fill_(unseen, living.mean() if len(living) else 1.0)
    return moment


def permuted(tensor: Tensor, order: Tensor) -> Tensor:
    """Rows of (*batch, n, m) in ``order`` (*batch, n); leading dimensions match."""
    return tensor.gather(-2, order.unsqueeze(-1).expand_as(tensor))
