"""Round to nearest plus a low-rank term for the error: Ŵ = Q + L with rank(L) <= r.

With E = W - Q the term that minimizes |(E - L) M|_F is L = U Uᵀ E, U the r leading left singular
vectors of E M. The metrics:

``plain``        M = I (ZeroQuant-V2's LoRC, arXiv 2303.08302, and arXiv 2507.17417)
``lqer``         M = diag(E|x_j|) (L²QER, arXiv 2402.02446, which takes the largest mean of a batch;
                 here the mean of all tokens)
``qera_approx``  M = diag(sqrt(E[x_j²])) (QERA, arXiv 2410.06040)
``qera_exact``   M Mᵀ = E[xxᵀ] (QERA, ibid.): the least output error. A Cholesky factor instead of
                 the square root: the same optimum
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...calibration.statistics import SiteStatistics
from ...ground.errors import NumericalFailure
from ...quantizer.quantized_weight import Compensated
from ...schemes.quant_scheme import QuantScheme
from ..defaults import BRANCH_INPUT, FACTORS, METRIC, RANK
from ..solvers.cholesky import damped_cholesky
from ..solvers.factors import stored_term
from ..solvers.precision import checked, distance, probes, recorded
from ..solvers.singular import deviation, leading_directions
from .rtn import rtn

# smallest damping of E[xxᵀ] under qera_exact; raised where a float32 second moment of few tokens
# needs more
RIDGE = 1e-10
SMALLEST_MEAN = 1e-4  # of lqer, as published


def low_rank(
    weight: Tensor,
    statistics: SiteStatistics,
    scheme: QuantScheme,
    rank: int | float = RANK,
    metric: str = METRIC,
    factors: str = FACTORS,
    branch_input: str = BRANCH_INPUT,
    global_scale: Tensor | None = None,
) -> Compensated:
    """Round ``weight`` (*batch, m, n) to nearest and add a term of rank ``rank``
    (:func:`compensated`)."""
    rounded = rtn(weight, statistics, scheme, global_scale)
    return compensated(weight, rounded, statistics, rank, metric, factors, branch_input)


def compensated(
    weight: Tensor,
    solved: Compensated,
    statistics: SiteStatistics,
    rank: int | float,
    metric: str,
    factors: str,
    branch_input: str,
) -> Compensated:
    """``solved`` with a low-rank term for its error from ``weight`` (*batch, m, n); unchanged at
    rank 0.

    ``rank`` is a number or, below 1, a fraction of the smaller dimension. ``factors`` is a key of
    ``factors.FACTORS``.
    """
    rank = rank_of(rank, weight.shape)
    if rank == 0:
        return solved
    error = (weight - solved.weight()).double()
    left, right, details = term(error, statistics, rank, metric)
    values, stored = stored_term(left, right, error, factors)
    return replace(solved, low_rank=values, factors=stored, branch_input=branch_input, details=solved.details | details)


def rank_of(rank: int | float, shape: torch.Size) -> int:
    """Rank for a weight of ``shape`` (*batch, m, n); a fraction of the smaller dimension is at
    least 1."""
    smaller = min(shape[-2:])
    return min(rank, smaller) if isinstance(rank, int) else max(1, round(rank * smaller))


def term(error: Tensor, statistics: SiteStatistics, rank: int, metric: str) -> tuple[Tensor, Tensor, dict[str, list]]:
    """Optimal term for ``error`` (*batch, m, n): (left (*batch, m, r), right (*batch, r, n),
    details per layer).

    Factors are float64. Details: ``svd``, the solver of large matrices, under ``qera_exact`` ``ridge``,
    the damping of E[xxᵀ] that was needed, and dtypes where the solver dtype is float32.
    """
    matrices = error.reshape(-1, *error.shape[-2:]).double()
    halves, details = _metric(statistics, metric)
    halves = (
        [None] * len(matrices)
        if halves is None
        else halves.reshape(-1, *halves.shape[-(2 if metric == "qera_exact" else 1) :])
    )
    found, record, dtypes = [], [], []
    for matrix, half in zip(matrices, halves):  # one at a time, to stay in the cache
        about: dict[str, str] = {}
        left, dtype = _directions(matrix, half, rank, statistics.solver_dtype, about)
        found.append((left, left.mT @ matrix))
        record.append(about.get("svd", ""))
        dtypes.append(dtype)
    left, right = (torch.stack(parts).reshape(*error.shape[:-2], *parts[0].shape) for parts in zip(*found))
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise NumericalFailure("low-rank: the singular vectors hold NaN or infinity")
    details |= {"svd": record} if any(record) else {}
    return left, right, details | recorded("svd_dtype", statistics.solver_dtype, dtypes)


def _directions(
    matrix: Tensor, half: Tensor | None, rank: int, dtype: torch.dtype, about: dict[str, str]
) -> tuple[Tensor, str]:
    """Leading left singular vectors (m, r) of ``matrix`` times M in float64, and the dtype that they took.

    ``half`` M is the identity for None, a diagonal (n,) or a matrix (n, n).
    """

    def weighted(used: torch.dtype) -> Tensor:
        wide = matrix.to(used)
        if half is None:
            return wide
        return wide @ half.to(used) if half.dim() == 2 else wide * half.to(used)

    found, name = checked(
        dtype,
        lambda used: leading_directions(weighted(used), rank, about),
        lambda vectors: deviation(weighted(vectors.dtype), vectors),
    )
    return found.double(), name


def column_weights(statistics: SiteStatistics, metric: str) -> Tensor:
    """Diagonal (*batch, n) of M in float64, for a metric with a diagonal M."""
    if metric == "lqer":
        return statistics.mean_absolute.double().clamp(min=SMALLEST_MEAN)
    diagonal = statistics.second_moment.diagonal(dim1=-2, dim2=-1).double()
    return diagonal.clamp(min=0).sqrt() if metric == "qera_approx" else torch.ones_like(diagonal)


def _metric(statistics: SiteStatistics, metric: str) -> tuple[Tensor | None, dict[str, list]]:
    """(M, details): M is a diagonal (*batch, n), a lower triangle (*batch, n, n), or None for the
    identity."""
    if metric == "plain":
        return None, {}
    if metric != "qera_exact":
        return column_weights(statistics, metric), {}

    def factorized(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        damped = statistics.second_moment.to(dtype, copy=True)
        return *damped_cholesky(damped, RIDGE), damped

    def error(found: tuple[Tensor, Tensor, Tensor]) -> float:
        lower, _, damped = found
        x = probes(damped)
        return distance(lower @ (lower.mT @ x), damped @ x)

    def checked_factor() -> tuple[Tensor, Tensor, str]:
        (lower, used, _), dtype = checked(statistics.solver_dtype, factorized, error)
        return lower, used, dtype

    lower, used, dtype = statistics.remembered("cholesky", checked_factor)
    ridges = used.flatten().tolist()
    return lower, {"ridge": ridges, **recorded("ridge_dtype", statistics.solver_dtype, [dtype] * len(ridges))}
