"""Cholesky factorization with adaptive damping, for moments of few tokens or rounded to float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ground.errors import NumericalFailure

LARGEST_DAMPING = 10.0


def damped_cholesky(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(L, damping used): lower triangular L (*batch, n, n), L Lᵀ = C + damping * mean(diag C) I,
    float64.

    ``moment`` in float64 is overwritten: a copy would double the memory of the solver. Where the
    factorization fails, the damping of that matrix is raised tenfold until it succeeds. Beyond
    ``LARGEST_DAMPING`` the function raises ``NumericalFailure``.
    """
    moment = moment.double()
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    plain, mean = diagonal.clone(), diagonal.mean(-1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    used = torch.full_like(mean, damping)
    while True:
        diagonal.copy_(plain + (used * mean).unsqueeze(-1))
        lower, failed = torch.linalg.cholesky_ex(moment)
        if not failed.any():
            return lower, used
        used = torch.where(failed > 0, torch.clamp(used * 10, min=1e-6), used)
        if used.max() > LARGEST_DAMPING:
            raise NumericalFailure(
                f"Cholesky factorization of the second moment failed with damping up to {LARGEST_DAMPING}"
            )
