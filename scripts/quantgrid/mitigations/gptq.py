"""GPTQ (arXiv 2210.17323): columns are rounded one after another, each error is offset by the columns still to come.

With H = E[xxᵀ] + damping * mean(diag) I and U upper triangular, UᵀU = H⁻¹, column i leaves the error e_i = (w_i - q_i) / U_ii, and
every later column j becomes w_j - e_i U_ij. The sum of |e_i|² is tr((Q - W) H (Q - W)ᵀ). ``columns.py`` holds that recursion.
Scales are static by default. The published code refreshes them per group but reads them off a copy that misses the errors made in the
same block; ``running`` scales see all errors made so far.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError, NumericalFailure
from ..quantizer import QuantScheme, quantize
from ..statistics import SiteStatistics
from .cholesky import damped_cholesky
from .columns import Columns, Sweep
from .compensated import Compensated

LARGEST_SOLVED = 96  # order up to which a triangular solve beats splitting


def inverse_factor(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(U, damping used): upper triangular U (*batch, n, n) with UᵀU = (C + damping * mean(diag C) I)⁻¹, in float64.

    One Cholesky factorization of the matrix with rows and columns reversed gives H = V Vᵀ with V upper triangular, and U = V⁻¹.
    Of a large site each of these matrices is half a GB: none is kept once the next one is there.
    """
    moment = moment.flip(-1, -2)
    upper, used = damped_cholesky(moment, damping)
    del moment
    upper = upper.flip(-1, -2)
    return invert_upper(upper), used


def invert_upper(upper: Tensor) -> Tensor:
    """Inverse of upper triangular (*batch, n, n): halves inverted by themselves, the corner by two products."""
    n = upper.shape[-1]
    if n <= LARGEST_SOLVED:
        return torch.linalg.solve_triangular(upper, torch.eye(n, dtype=upper.dtype, device=upper.device).expand_as(upper), upper=True)
    first, second = slice(None, n // 2), slice(n // 2, None)
    inverse = torch.zeros_like(upper)
    inverse[..., first, first] = invert_upper(upper[..., first, first])
    inverse[..., second, second] = invert_upper(upper[..., second, second])
    inverse[..., first, second] = -inverse[..., first, first] @ upper[..., first, second] @ inverse[..., second, second]
    return inverse


def gptq(weight: Tensor, statistics: SiteStatistics, scheme: QuantScheme, damping: float = 0.01, block_size: int = 128,
         activation_order: bool = False, scales: str = "static") -> Compensated:
    """GPTQ of ``weight`` (*batch, m, n) against the second moment (*batch, n, n) of its input.

    ``damping`` is relative to the mean of the diagonal. ``activation_order`` rounds columns of large E[x_j²] first; groups and
    scales stay where they are (static groups). ``scales``: ``static``, all from the weight before the first rounding, or ``running``,
    those of a group from its columns as they are when it is reached (not in activation order, where no group is ever whole).
    A column whose input never was non-zero is set to zero, as published.
    """
    return solve(weight, statistics, scheme, damping, block_size, activation_order, scales)


def solve(weight: Tensor, statistics: SiteStatistics, scheme: QuantScheme, damping: float, block_size: int, activation_order: bool,
          scales: str = "static", drift: Callable[[Tensor, Tensor | None], Tensor] | None = None) -> Compensated:
    """What :func:`gptq` does; ``drift`` makes of (U, order) the P (*batch, n, n) of GPTAQ."""
    if activation_order and scales == "running":
        raise ConfigError("GPTQ: scales 'running' are found group by group, which activation_order leaves no group for; use 'static'")
    weight = weight.float()
    diagonal = statistics.second_moment.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    weight = weight.masked_fill(dead.unsqueeze(-2), 0.0)
    found = used = Columns.of(weight, scheme, scales == "running")
    columns = weight.mT.contiguous()
    order = diagonal.argsort(dim=-1, descending=True, stable=True) if activation_order else None
    if order is not None:
        columns, used = _permuted(columns, order), used.changed(lambda x: _permuted(x, order))
    factor, damped = statistics.remembered(("gptq", damping, activation_order), lambda: _site_factor(statistics, dead, order, damping))
    Sweep(columns, factor, used, None if drift is None else drift(factor, order)).run(block_size)
    if order is not None:
        columns = _permuted(columns, order.argsort(-1))
    if not torch.isfinite(columns).all():
        raise NumericalFailure("GPTQ: the rounded weight holds NaN or infinity")
    return Compensated(quantize(columns.mT, scheme, found.parameters), details={"damping": damped.flatten().tolist()})


def _site_factor(statistics: SiteStatistics, dead: Tensor, order: Tensor | None, damping: float) -> tuple[Tensor, Tensor]:
    """:func:`inverse_factor` of a site, in float32, columns in ``order``; a dead column counts as one of mean size, so that
    it does not change the damping of the others (the published code gives it 1, beside sums over all tokens).

    One matrix at a time: float64 copies of all layers at once would only go through memory instead of the cache.
    """
    moments = statistics.second_moment
    n = moments.shape[-1]
    orders = [slice(None)] * (moments.numel() // n**2) if order is None else order.reshape(-1, n)
    factors = []
    for moment, unseen, columns in zip(moments.reshape(-1, n, n), dead.reshape(-1, n), orders):
        factor, used = inverse_factor(_living(moment, unseen)[columns][:, columns], damping)
        factors.append((factor.float(), used))
    factor, used = (torch.stack(parts) for parts in zip(*factors))
    return factor.reshape(moments.shape), used.reshape(moments.shape[:-2])


def _living(moment: Tensor, unseen: Tensor) -> Tensor:
    """A float64 copy of ``moment`` (n, n), with the mean of the other diagonal entries where a column is ``unseen`` (n,)."""
    moment = moment.to(torch.float64, copy=True)
    living = moment.diagonal()[~unseen]
    moment.diagonal().masked_fill_(unseen, living.mean() if len(living) else 1.0)
    return moment


def _permuted(tensor: Tensor, order: Tensor) -> Tensor:
    """Rows of (*batch, n, m) in ``order`` (*batch, n); what stands before them is shared."""
    return tensor.gather(-2, order.unsqueeze(-1).expand_as(tensor))
