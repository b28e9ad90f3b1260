"""Primitive: invertible blocks that give inputs and weights of a site the same second moment.

WUSH (arXiv 2512.00956). Per block of k channels with the second moment C of its inputs and the k
columns W (R, k) of all linears at the site: C = BᵀB with B upper triangular, B Wᵀ / sqrt(R) =
V S Oᵀ, and the input x (k,) becomes T x with T = H sqrt(S) Vᵀ B⁻ᵀ, H the normalized Hadamard
matrix. The weights are multiplied by T⁻¹. Then E[T x xᵀ Tᵀ] = T⁻ᵀ WᵀW T⁻¹ / R = H S Hᵀ: both have
the second moment with the eigenvalues S and a constant diagonal, and the product of its traces is
the smallest that any invertible T reaches, (Σ S)².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...ground.errors import NumericalFailure
from ...inference.online import as_rows
from ...linalg.blocks import diagonal_blocks, stacked_columns
from ...linalg.hadamard import apply_hadamard
from .block_rotate import InBlocks


@dataclass
class BalancedBlocks(InBlocks):
    """Blocks T of WUSH at ``sites``, online.

    ``hadamard`` off leaves H out. ``damping`` is added to C and to S, as a share of the mean of
    their diagonals.
    """

    hadamard: bool
    damping: float
    reads_layer = True

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """``{site}.blocks`` and ``{site}.inverse`` (n / size, size, size), float64: what rows of the
        input and rows of the weights are multiplied by."""
        found = {}
        for site in layer.plan.sites_of(self.sites):
            moments = diagonal_blocks(layer.statistics[site].second_moment.double(), self.size)
            weights = stacked_columns((layer.weights[linear] for linear in layer.plan.sites[site].linears), self.size)
            blocks, inverse = balancing_blocks(moments, weights, self.hadamard, self.damping, f"site '{site}'")
            found |= {f"{site}.blocks": blocks, f"{site}.inverse": inverse}
        return found

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in layer.plan.sites_of(self.sites):
            operation = {"operation": "block_rotate", "blocks": parameters[f"{site}.blocks"]}
            to_weights = as_rows({**operation, "blocks": parameters[f"{site}.inverse"]})
            for linear in layer.plan.sites[site].linears:
                layer.weights[linear] = to_weights(layer.weights[linear])
            rows = as_rows(operation)
            layer.add_online(site, operation, lambda statistics, rows=rows: statistics.transformed(rows))


def balancing_blocks(
    moments: Tensor, factors: Tensor, hadamard: bool, damping: float, where: str
) -> tuple[Tensor, Tensor]:
    """(Tᵀ, T⁻¹) of every block (blocks, k, k), float64.

    ``moments`` are C (blocks, k, k), ``factors`` F with FᵀF = WᵀW / R, like it. A block whose inputs
    or weights are all zero has C or S = I. Raises :class:`NumericalFailure`, naming ``where``, for a
    second moment or weights without full rank and no damping.
    """
    size = moments.shape[-1]
    level = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(size, dtype=torch.float64, device=moments.device)
    damped = torch.where(level > 0, moments + damping * level * eye, eye)
    upper, failed = torch.linalg.cholesky_ex(damped, upper=True)
    left, values, _ = torch.linalg.svd(upper @ factors.mT)
    mean = values.mean(-1, keepdim=True)
    values = torch.where(mean > 0, values + damping * mean, 1.0)
    if failed.any() or (values <= 0).any():
        raise NumericalFailure(
            f"{where}: a block of {size} channels has inputs or weights without full rank, and 'damping' is "
            f"{damping:g}; the default 0.01 accepts them"
        )
    root = values.sqrt().unsqueeze(-2)
    blocks = torch.linalg.solve_triangular(upper, left * root, upper=True)
    inverse = upper.mT @ (left / root)
    return (apply_hadamard(blocks), apply_hadamard(inverse)) if hadamard else (blocks, inverse)
