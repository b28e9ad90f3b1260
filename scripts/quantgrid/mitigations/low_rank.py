"""Round to nearest plus a low-rank term for the error: Ŵ = Q + L with rank(L) <= r (ZeroQuant-V2's LoRC, QERA).

With E = W - Q the term that minimizes |(E - L) M|_F is L = U Uᵀ E, U the r leading left singular vectors of E M. ``plain`` takes
M = I (ZeroQuant-V2, arXiv 2303.08302, and the paper); ``exact`` takes M Mᵀ = E[xxᵀ] (QERA-exact, arXiv 2410.06040), which minimizes
the layer's output error. The branch reads the same quantized activation as Q does; its factors are stored in bfloat16.
"""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from ..errors import NumericalFailure
from ..quantizer import QuantScheme
from ..statistics import SiteStatistics
from .cholesky import damped_cholesky
from .compensated import Compensated
from .rtn import rtn

RIDGE = 1e-10  # damping of E[xxᵀ] under the exact metric: enough for a second moment of fewer tokens than channels


def leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors (m, rank) of ``matrix`` (m, n), from the smaller Gram matrix."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    gram = matrix.mT @ matrix if tall else matrix @ matrix.mT
    try:
        vectors = _top_eigenvectors(gram, rank)
    except (torch.linalg.LinAlgError, scipy.linalg.LinAlgError, ValueError) as error:
        raise NumericalFailure(f"low-rank: the singular vectors of the error cannot be found ({error})") from None
    return torch.linalg.qr(matrix @ vectors).Q if tall else vectors


def _top_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading eigenvectors (n, rank) of a symmetric (n, n): a third of the time where LAPACK finds no others."""
    if gram.is_cuda:
        return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1)
    wanted = [len(gram) - rank, len(gram) - 1]
    return torch.from_numpy(scipy.linalg.eigh(gram.numpy(), subset_by_index=wanted, driver="evr")[1]).flip(-1)


def compensation(error: Tensor, statistics: SiteStatistics, rank: int, metric: str) -> tuple[Tensor, Tensor] | None:
    """(left (*batch, m, r), right (*batch, r, n)) in bfloat16 for ``error`` (*batch, m, n); None at rank 0."""
    rank = min(rank, *error.shape[-2:])
    if rank == 0:
        return None
    matrices = error.reshape(-1, *error.shape[-2:]).double()
    halves: list[Tensor] | Tensor = [torch.ones(())] * len(matrices)
    if metric == "exact":
        halves = statistics.remembered("cholesky", lambda: damped_cholesky(statistics.second_moment, RIDGE)[0])
        halves = halves.reshape(-1, *halves.shape[-2:])
    factors = []
    for matrix, half in zip(matrices, halves):  # one at a time: it stays in the cache
        left = leading_directions(matrix @ half if half.dim() else matrix, rank)
        factors.append((left, left.mT @ matrix))
    left, right = (torch.stack(parts).reshape(*error.shape[:-2], *parts[0].shape) for parts in zip(*factors))
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise NumericalFailure("low-rank: the singular vectors hold NaN or infinity")
    return left.to(torch.bfloat16), right.to(torch.bfloat16)


def low_rank(weight: Tensor, statistics: SiteStatistics, scheme: QuantScheme, rank: int = 32, metric: str = "plain") -> Compensated:
    """Round ``weight`` (*batch, m, n) to nearest and compensate the error by a term of rank ``rank``."""
    rounded = rtn(weight, statistics, scheme)
    return Compensated(rounded.quantized, compensation(weight - rounded.dequantized(), statistics, rank, metric))
