"""A Cholesky factor of a second moment that may have none: of few tokens, or rounded to float32 in a file."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalFailure

LARGEST_DAMPING = 10.0


def damped_cholesky(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(L, damping used): lower triangular L (*batch, n, n) with L Lᵀ = C + damping * mean(diag C) I, in float64.

    ``moment`` in float64 is overwritten: a copy of a large one would be as much memory as all that the solver holds. Where it fails the damping of
    that matrix is raised tenfold until it succeeds; beyond ``LARGEST_DAMPING`` the cell fails.
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
            raise NumericalFailure(f"no Cholesky factor of the second moment with damping up to {LARGEST_DAMPING}")
