"""Primitives: online rotations of blocks of neighbouring channels, T = I ⊗ H or fitted blocks.

A rotation of the whole input spreads one outlier over all groups of a weight or activation; a block
rotation keeps it in its block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...ground.errors import ConfigError
from ...inference.online import as_rows
from ...inference.transform import Primitive, derived_seed
from ...models.shapes import ModelShape
from .rotate import rotate_online, turn_heads


@dataclass
class InBlocks(Primitive):
    """Base class of primitives on blocks of ``size`` neighbouring channels at ``sites``."""

    size: int
    sites: list[str]

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        """Fit nothing; raise :class:`ConfigError` if blocks do not divide the inputs of a site."""
        for site in self.sites:
            for size in shape.site_sizes(site):
                if size % self.size:
                    raise ConfigError(
                        f"blocks of {self.size} do not divide the {size} inputs of site '{site}'; "
                        "choose a size that does"
                    )
        return {}


@dataclass
class BlockHadamard(InBlocks):
    """I ⊗ H with a Hadamard matrix of order ``size`` (MR-GPTQ, arXiv 2509.23202), online.

    It acts at all ``sites`` and moves no norm gain. ``fold_heads``: at ``output_input`` it moves
    into v, exactly, if ``size`` divides the head size and no gate stands behind the attention.
    """

    fold_heads: bool

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        operation = {"operation": "block_hadamard", "size": self.size}
        for site in layer.plan.sites_of(self.sites):
            if (
                self.fold_heads
                and layer.plan.sites[site].turns
                and layer.shape.heads_at(site).size % self.size == 0
                and not layer.online[site]
            ):
                turn_heads(layer, site, as_rows(operation))
            else:
                rotate_online(layer, site, operation)


@dataclass
class GreedyBlocks(InBlocks):
    """Greedy block rotation of DuQuant (arXiv 2406.01721).

    Each step spreads the channel of largest magnitude over its block. A step is E M E with E the
    exchange of that channel and the first, M a fixed orthogonal matrix with a uniform first row
    (the other rows Haar; the published code draws M anew at steps, this one does not). Of up to
    ``steps`` steps the prefix with the smallest maximum on the token sample is kept, none if none
    helps. ``shared``: one rotation for all blocks of a site, fitted to the largest magnitude of
    all, as published; otherwise one per block. ``stream`` distinguishes the rotations of one
    recipe.
    """

    steps: int
    seed: int
    stream: int
    shared: bool
    reads_layer = True

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Blocks per site (n / size, size, size), shared (1, size, size)."""
        spread = spreading_matrix(self.size, derived_seed(self.seed, "blocks", self.stream))
        return {
            site: greedy_rotation(layer.statistics[site].samples, spread, self.steps, self.shared)
            for site in layer.plan.sites_of(self.sites)
        }

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in layer.plan.sites_of(self.sites):
            rotate_online(layer, site, {"operation": "block_rotate", "blocks": parameters[site]})


def spreading_matrix(size: int, seed: int) -> Tensor:
    """Random orthogonal (size, size) matrix, float64, with first row 1 / sqrt(size), otherwise
    Haar."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(size, size, generator=generator, dtype=torch.float64)
    columns[:, 0] = 1
    q, r = torch.linalg.qr(columns)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).mT.contiguous()


def greedy_rotation(samples: Tensor, spread: Tensor, steps: int, shared: bool = False) -> Tensor:
    """Orthogonal blocks (n / size, size, size), or (1, size, size) if ``shared``, float64.

    ``samples`` are tokens (tokens, n), ``spread`` is the matrix of a step (size, size).
    """
    size, spread = len(spread), spread.to(samples.device)
    x = samples.float().reshape(1, -1, size) if shared else samples.float().unflatten(-1, (-1, size)).transpose(0, 1)
    blocks = len(x)
    rotation = torch.eye(size, dtype=torch.float64, device=x.device).repeat(blocks, 1, 1)
    best, least = rotation, x.abs().amax((1, 2))
    every, channels = torch.arange(blocks, device=x.device), torch.arange(size, device=x.device)
    for _ in range(steps):
        peak, order = x.abs().amax(1).argmax(1), channels.repeat(blocks, 1)
        order[every, peak], order[:, 0] = 0, peak
        step = spread[order.unsqueeze(2), order.unsqueeze(1)]  # E M E of every block
        x, rotation = x @ step.float(), rotation @ step
        found = x.abs().amax((1, 2))
        best, least = torch.where((found < least)[:, None, None], rotation, best), torch.minimum(found, least)
    return best
