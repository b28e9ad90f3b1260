"""Cholesky factorization with adaptive damping, for moments of few tokens or rounded to float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ground.errors import NumericalFailure

LARGEST_DAMPING = 10.0


def damped_cholesky(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(L, damping used (*batch,) float64): lower triangular L (*batch, n, n), L Lᵀ = C + damping * mean(diag
    C) I.

    ``moment`` C in float64 or float32 is overwritten: a copy would double the memory of the solver.
    Where the factorization fails in float64, the damping of that matrix is raised tenfold until it
    succeeds. Beyond ``LARGEST_DAMPING``, or at once in float32, the function raises
    ``NumericalFailure``.
    """
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    plain, mean = diagonal.clone(), diagonal.mean(-1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    used = torch.full_like(mean, damping, dtype=torch.float64)
    while True:
        diagonal.copy_(plain + (used * mean).unsqueeze(-1))
        lower, failed = torch.linalg.cholesky_ex(moment)
        if not failed.any():
            return lower, used
        if moment.dtype != torch.float64:
            raise NumericalFailure(f"Cholesky factorization of the second moment failed in {moment.dtype}")
        used = torch.where(failed > 0, torch.clamp(used * 10, min=1e-6), used)
        if used.max() > LARGEST_DAMPING:
            raise NumericalFailure(
                f"Cholesky factorization of the second moment failed with damping up to {LARGEST_DAMPING}"
            )
