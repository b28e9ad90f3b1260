"""GPTQ (arXiv 2210.17323): columns are rounded one after another, each error is offset by the columns still to come.

With H = E[xxᵀ] + damping * mean(diag) I and U upper triangular, UᵀU = H⁻¹, column i leaves the error e_i = (w_i - q_i) / U_ii, and
every later column j becomes w_j - e_i U_ij. The sum of |e_i|² is tr((Q - W) H (Q - W)ᵀ). The recursion below halves the columns
until ``block_size`` are left and moves errors between halves by matrix products; the order of roundings is the published one.
Scales are static: taken from the weight before the first rounding (the published code refreshes them per group).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NumericalFailure
from ..quantizer import QuantizationParameters, QuantScheme, codebooks, find_parameters, quantize, round_values, step_size, zero_points
from ..statistics import SiteStatistics
from .cholesky import damped_cholesky
from .compensated import Compensated

LARGEST_SOLVED = 96  # order up to which a triangular solve beats splitting
LEAF = 16  # columns rounded one by one before a matrix product takes over


def inverse_factor(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(U, damping used): upper triangular U (*batch, n, n) with UᵀU = (C + damping * mean(diag C) I)⁻¹, in float64.

    One Cholesky factorization of the matrix with rows and columns reversed gives H = V Vᵀ with V upper triangular, and U = V⁻¹.
    """
    lower, used = damped_cholesky(moment.flip(-1, -2), damping)
    return invert_upper(lower.flip(-1, -2)), used


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


@dataclass(frozen=True)
class _Columns:
    """What rounds columns: steps and zero points (*batch, n, m), codebooks (entries, *batch, n, m); None where the scheme has none."""

    scheme: QuantScheme
    steps: Tensor
    zeros: Tensor | None
    books: Tensor | None

    @classmethod
    def of(cls, parameters: QuantizationParameters, scheme: QuantScheme, shape: torch.Size) -> _Columns:
        steps, zeros, books = (part(parameters, scheme, shape) for part in (step_size, zero_points, codebooks))
        zeros = None if zeros is None else _per_column(zeros, shape[-1])
        books = None if books is None else torch.stack([_per_column(entry, shape[-1]) for entry in books.unbind(-1)])
        return cls(scheme, _per_column(steps, shape[-1]), zeros, books)

    def changed(self, change: Callable[[Tensor], Tensor]) -> _Columns:
        """Columns selected or reordered by ``change``, along the last dimension but one."""
        return replace(self, **{name: change(part) for name, part in (("steps", self.steps), ("zeros", self.zeros), ("books", self.books))
                                if part is not None})

    def rounded(self, column: Tensor, i: int) -> Tensor:
        """Column ``i``, with the values ``column`` (*batch, m), rounded."""
        step, zero = self.steps[..., i, :], None if self.zeros is None else self.zeros[..., i, :]
        if self.books is None:
            return round_values(column, step, zero, self.scheme)
        return round_values(column.unsqueeze(-1), step.unsqueeze(-1), None, self.scheme, self.books[..., i, :].movedim(0, -1)).squeeze(-1)


def _round_columns(columns: Tensor, factor: Tensor, errors: Tensor, used: _Columns) -> None:
    """Round ``columns`` (*batch, k, m), in place, offsetting each error in those after it; ``factor`` (*batch, k, k)."""
    count = columns.shape[-2]
    if count <= LEAF:
        for i in range(count):
            column = columns[..., i, :]
            rounded = used.rounded(column, i)
            error = (column - rounded) / factor[..., i, i, None]
            errors[..., i, :] = error
            columns[..., i, :] = rounded
            if i + 1 < count:
                columns[..., i + 1:, :] -= factor[..., i, i + 1:, None] * error.unsqueeze(-2)
        return
    half = (count // 2 + LEAF - 1) // LEAF * LEAF
    first, second = slice(None, half), slice(half, None)
    for part in (first, second):
        _round_columns(columns[..., part, :], factor[..., part, part], errors[..., part, :], used.changed(lambda x, part=part: x[..., part, :]))
        if part is first:
            columns[..., second, :] -= factor[..., first, second].mT @ errors[..., first, :]


def _per_column(values: Tensor, columns: int) -> Tensor:
    """One value per (row, group) (*batch, m, groups) as one per column and row (*batch, n, m), without copying within a group."""
    transposed = values.mT
    groups = transposed.shape[-2]
    return transposed.unsqueeze(-2).expand(*transposed.shape[:-1], columns // groups, transposed.shape[-1]).flatten(-3, -2)


def gptq(weight: Tensor, statistics: SiteStatistics, scheme: QuantScheme, damping: float = 0.01, block_size: int = 128,
         activation_order: bool = False) -> Compensated:
    """GPTQ of ``weight`` (*batch, m, n) against the second moment (*batch, n, n) of its input.

    ``damping`` is relative to the mean of the diagonal. ``activation_order`` rounds columns of large E[x_j²] first; groups and
    scales stay where they are (static groups). A column whose input never was non-zero is set to zero, as published.
    """
    weight = weight.float()
    diagonal = statistics.second_moment.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    weight = weight.masked_fill(dead.unsqueeze(-2), 0.0)
    parameters = find_parameters(weight, scheme)
    columns, used = weight.mT.contiguous(), _Columns.of(parameters, scheme, weight.shape)
    order = diagonal.argsort(dim=-1, descending=True, stable=True) if activation_order else None
    if order is not None:
        columns, used = _permuted(columns, order), used.changed(lambda x: _permuted(x, order))
    factor, damped = statistics.remembered(("gptq", damping, activation_order), lambda: _site_factor(statistics, dead, order, damping))
    errors = torch.empty_like(columns)
    for start in range(0, columns.shape[-2], block_size):
        block, rest = slice(start, start + block_size), slice(start + block_size, None)
        _round_columns(columns[..., block, :], factor[..., block, block], errors[..., block, :],
                       used.changed(lambda x, block=block: x[..., block, :]))
        columns[..., rest, :] -= factor[..., block, rest].mT @ errors[..., block, :]
    if order is not None:
        columns = _permuted(columns, order.argsort(-1))
    if not torch.isfinite(columns).all():
        raise NumericalFailure("GPTQ: the rounded weight holds NaN or infinity")
    return Compensated(quantize(columns.mT, scheme, parameters), details={"damping": damped.flatten().tolist()})


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
        moment = moment.to(torch.float64, copy=True)
        living = moment.diagonal()[~unseen]
        moment.diagonal().masked_fill_(unseen, living.mean() if len(living) else 1.0)
        factors.append(inverse_factor(moment[columns][:, columns], damping))
    factor, used = (torch.stack(parts) for parts in zip(*factors))
    return factor.float().reshape(moments.shape), used.reshape(moments.shape[:-2])


def _permuted(tensor: Tensor, order: Tensor) -> Tensor:
    """Rows of (*batch, n, m) in ``order`` (*batch, n); what stands before them is shared."""
    return tensor.gather(-2, order.unsqueeze(-1).expand_as(tensor))
