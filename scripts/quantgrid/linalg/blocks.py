"""Second moments of inputs and weights in blocks of neighbouring channels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def diagonal_blocks(moment: Tensor, size: int) -> Tensor:
    """Blocks (n / size, size, size) on the diagonal of ``moment`` (n, n)."""
    tiles = moment.unflatten(0, (-1, size)).unflatten(-1, (-1, size))
    return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def stacked_columns(weights: Iterable[Tensor], size: int) -> Tensor:
    """Triangular factors F (n / size, size, size) of the columns W (R, size) of each block, with
    FᵀF = WᵀW / R; ``weights`` are (m, n), read one at a time, and R is the sum of m."""
    rows, factors = 0, None
    for weight in weights:
        tiles = weight.double().unflatten(-1, (-1, size)).transpose(0, 1)
        rows += len(weight)
        factors = torch.linalg.qr(tiles if factors is None else torch.cat([factors, tiles], -2), mode="r").R
    missing = factors.new_zeros(len(factors), size - factors.shape[-2], size)
    return torch.cat([factors, missing], -2) / rows**0.5


def trace_products(moment: Tensor, weights: Iterable[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Products of the traces of both second moments, and their lower bounds, per block: (n / size,) each.

    With the second moment C of a block's inputs (``moment`` is (n, n)) and the columns W (R, size) of
    the ``weights`` (m, n) there, the product is tr C tr(WᵀW / R) and the bound (Σ S)², with S the singular
    values of C^{1/2} Wᵀ / sqrt(R). No invertible transform of the block reaches less than the bound, and WUSH
    without damping reaches it (arXiv 2512.00956). It is 0 for a block without inputs or without weights, and
    where no input meets a weight: below the error of float64, size² eps of the product, which is then approached
    by no transform but in the limit.
    """
    blocks, factors = diagonal_blocks(moment.double(), size), stacked_columns(weights, size)
    values, axes = torch.linalg.eigh(blocks)
    root = values.clamp(min=0).sqrt().unsqueeze(-1) * axes.mT
    bounds = torch.linalg.svdvals(root @ factors.mT).sum(-1).square()
    products = blocks.diagonal(dim1=-2, dim2=-1).sum(-1) * factors.square().sum((-2, -1))
    return products, bounds.where(bounds > size**2 * torch.finfo(bounds.dtype).eps * products, 0.0)
