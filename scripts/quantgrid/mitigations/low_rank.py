"""Round to nearest plus a low-rank term for the error: Ŵ = Q + L with rank(L) <= r.

With E = W - Q the term that minimizes |(E - L) M|_F is L = U Uᵀ E, U the r leading left singular vectors of E M. The metrics:

``plain``        M = I (ZeroQuant-V2's LoRC, arXiv 2303.08302, and arXiv 2507.17417)
``lqer``         M = diag(E|x_j|) (L²QER, arXiv 2402.02446, which takes the largest mean of a batch; here the mean of all tokens)
``qera_approx``  M = diag(sqrt(E[x_j²])) (QERA, arXiv 2410.06040)
``qera_exact``   M Mᵀ = E[xxᵀ] (QERA, ibid.): the least output error. A Cholesky factor instead of the square root: the same optimum
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import NumericalFailure
from ..quantizer import QuantScheme
from ..statistics import SiteStatistics
from .cholesky import damped_cholesky
from .compensated import Compensated
from .factors import stored_term
from .rtn import rtn
from .singular import leading_directions

RIDGE = 1e-10  # least damping of E[xxᵀ] under qera_exact; raised where a second moment of few tokens, kept in float32, needs more
SMALLEST_MEAN = 1e-4  # of lqer, as published


def low_rank(weight: Tensor, statistics: SiteStatistics, scheme: QuantScheme, rank: int | float = 32, metric: str = "plain",
             factors: str = "bf16", branch_input: str = "quantized") -> Compensated:
    """Round ``weight`` (*batch, m, n) to nearest and compensate the error by a term of rank ``rank`` (:func:`compensated`)."""
    return compensated(weight, rtn(weight, statistics, scheme), statistics, rank, metric, factors, branch_input)


def compensated(weight: Tensor, solved: Compensated, statistics: SiteStatistics, rank: int | float, metric: str, factors: str,
                branch_input: str) -> Compensated:
    """``solved`` with a low-rank term for what it leaves of ``weight`` (*batch, m, n); as it is at rank 0.

    ``rank`` is a number or, below 1, a share of the smaller dimension; ``factors`` a name of ``factors.FACTORS``.
    """
    rank = rank_of(rank, weight.shape)
    if rank == 0:
        return solved
    error = (weight - solved.weight()).double()
    left, right, details = term(error, statistics, rank, metric)
    values, stored = stored_term(left, right, error, factors)
    return replace(solved, low_rank=values, factors=stored, branch_input=branch_input, details=solved.details | details)


def rank_of(rank: int | float, shape: torch.Size) -> int:
    """The rank for a weight of ``shape`` (*batch, m, n): a share is of the smaller dimension, and at least 1."""
    smaller = min(shape[-2:])
    return min(rank, smaller) if isinstance(rank, int) else max(1, round(rank * smaller))


def term(error: Tensor, statistics: SiteStatistics, rank: int, metric: str) -> tuple[Tensor, Tensor, dict[str, list]]:
    """(left (*batch, m, r), right (*batch, r, n), details per layer) in float64, the best term for ``error`` (*batch, m, n).

    Details: ``svd``, how large matrices were solved, and under ``qera_exact`` ``ridge``, the damping of E[xxᵀ] that was needed.
    """
    matrices = error.reshape(-1, *error.shape[-2:]).double()
    halves, details = _metric(statistics, metric)
    halves = [None] * len(matrices) if halves is None else halves.reshape(-1, *halves.shape[-(2 if metric == "qera_exact" else 1):])
    found, record = [], []
    for matrix, half in zip(matrices, halves):  # one at a time: it stays in the cache
        about: dict[str, str] = {}
        left = leading_directions(matrix if half is None else matrix @ half if half.dim() == 2 else matrix * half, rank, about)
        found.append((left, left.mT @ matrix))
        record.append(about.get("svd", ""))
    left, right = (torch.stack(parts).reshape(*error.shape[:-2], *parts[0].shape) for parts in zip(*found))
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise NumericalFailure("low-rank: the singular vectors hold NaN or infinity")
    return left, right, details | ({"svd": record} if any(record) else {})


def column_weights(statistics: SiteStatistics, metric: str) -> Tensor:
    """The diagonal (*batch, n) of M under a metric that has one; float64."""
    if metric == "lqer":
        return statistics.mean_absolute.double().clamp(min=SMALLEST_MEAN)
    diagonal = statistics.second_moment.diagonal(dim1=-2, dim2=-1).double()
    return diagonal.clamp(min=0).sqrt() if metric == "qera_approx" else torch.ones_like(diagonal)


def _metric(statistics: SiteStatistics, metric: str) -> tuple[Tensor | None, dict[str, list]]:
    """(M, details): M is a diagonal (*batch, n), a lower triangle (*batch, n, n), or None for the identity."""
    if metric == "plain":
        return None, {}
    if metric != "qera_exact":
        return column_weights(statistics, metric), {}
    lower, used = statistics.remembered("cholesky", lambda: damped_cholesky(statistics.second_moment.to(torch.float64, copy=True), RIDGE))
    return lower, {"ridge": used.flatten().tolist()}
