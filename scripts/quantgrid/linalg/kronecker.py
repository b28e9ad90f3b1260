"""Products with a Kronecker product of two small matrices, without forming it."""

from __future__ import annotations

from torch import Tensor


def apply_kronecker(x: Tensor, left: Tensor, right: Tensor | None = None) -> Tensor:
    """x (left ⊗ right) along the last dimension (..., n1 n2). Differentiable.

    Every row, as a matrix X (n1, n2), becomes leftᵀ X right. ``left`` (n1, n1), ``right`` (n2, n2);
    without ``right`` that factor is the identity. The result has the type of ``x``.
    """
    matrix = left.to(x).mT @ x.unflatten(-1, (left.shape[0], -1))
    return (matrix if right is None else matrix @ right.to(x)).flatten(-2)
