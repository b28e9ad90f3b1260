"""Factorizations in float32 where a GPU is slow at float64, each checked and repeated in float64.

A second moment with a few massive directions has a condition number near the inverse of float32's
precision. So a factorization in float32 is accepted only if it inverts random vectors, or keeps a
space invariant, up to ``TOLERANCE``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from ...ground.errors import NumericalFailure

TOLERANCE = 1e-3  # largest accepted relative error in float32
PROBES = 8  # random vectors that a factorization is checked with

Found = TypeVar("Found")


def checked(
    dtype: torch.dtype, solve: Callable[[torch.dtype], Found], error: Callable[[Found], float]
) -> tuple[Found, str]:
    """(result of ``solve``, dtype that it was computed in).

    ``dtype`` float64 is neither checked nor changed. A result in float32 is repeated in float64 where
    ``solve`` fails or ``error`` of its result exceeds ``TOLERANCE``.
    """
    if dtype != torch.float64:
        try:
            found = solve(dtype)
        except (NumericalFailure, torch.linalg.LinAlgError):
            pass
        else:
            if error(found) <= TOLERANCE:  # False for NaN
                return found, str(dtype).removeprefix("torch.")
            del found
    return solve(torch.float64), "float64"


def probes(matrix: Tensor) -> Tensor:
    """Random vectors (n, PROBES) for a ``matrix`` (*batch, n, n), in its dtype and on its device."""
    drawn = torch.randn(matrix.shape[-1], PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.to(matrix)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest relative error of the vectors ``found`` (*batch, n, k), columns, from ``wanted``."""
    norms = (torch.linalg.vector_norm(part, dim=-2) for part in (found - wanted, wanted))
    errors, sizes = torch.broadcast_tensors(*norms)
    return torch.where(sizes > 0, errors / sizes, errors).max().item()


def recorded(name: str, dtype: torch.dtype, used: Iterable[str]) -> dict[str, list[str]]:
    """Entry ``name`` of the details of a linear, the dtypes ``used`` per layer; none where ``dtype`` is
    float64."""
    return {} if dtype == torch.float64 else {name: list(used)}
