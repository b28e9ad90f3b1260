"""Primitives: rotations of blocks of neighbouring channels, online at every site: T = I ⊗ H, or a matrix per block found from the tokens.

A rotation of the whole input spreads one outlier over all groups of a weight or activation; a block rotation keeps it in its block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..architecture import ModelShape
from ..decoders import DecoderLayer
from ..errors import ConfigError
from ..online import as_rows
from .composition import derived_seed
from .rotate import turn_online


@dataclass
class InBlocks:
    """What acts on blocks of ``size`` neighbouring channels at ``sites`` has in common."""

    size: int
    sites: list[str]

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        """Nothing; :class:`ConfigError` where blocks do not divide the inputs of a site."""
        for site in self.sites:
            if shape.site_size(site) % self.size:
                raise ConfigError(f"blocks of {self.size} do not divide the {shape.site_size(site)} inputs of site '{site}'; choose a size that does")
        return {}

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: all of it happens inside the layers."""


@dataclass
class BlockHadamard(InBlocks):
    """I ⊗ H with a Hadamard matrix of order ``size`` (MR-GPTQ, arXiv 2509.23202): online at all ``sites``, no norm gain moved.

    ``fold_heads``: at ``output_input`` it moves into v, exactly, where ``size`` divides the head size.
    """

    fold_heads: bool
    reads_layer = False

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        return {}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        operation = {"operation": "block_hadamard", "size": self.size}
        for site in self.sites:
            if self.fold_heads and site == "output_input" and layer.shape.head_dim % self.size == 0 and not layer.online[site]:
                rows, weights = as_rows(operation), layer.weights
                weights["v"], weights["o"] = rows(weights["v"].mT).mT, rows(weights["o"])
                if "v_bias" in weights:
                    weights["v_bias"] = rows(weights["v_bias"])
                layer.map_input(site, rows)
            else:
                turn_online(layer, site, operation)


@dataclass
class GreedyBlocks(InBlocks):
    """DuQuant's rotation of blocks (arXiv 2406.01721): step by step the channel with the largest magnitude is spread over its block.

    A step is E M E with E the exchange of that channel and the first, M a fixed orthogonal matrix whose first row is uniform (the others
    Haar; the published one is redrawn where ours is not). Of up to ``steps`` steps the prefix with the least largest magnitude on the token sample
    is kept, none if none helps. ``shared``: all blocks of a site have one rotation, found from the largest magnitude of them all, as published;
    otherwise each block has its own. ``stream`` tells the rotations of one recipe apart.
    """

    steps: int
    seed: int
    stream: int
    shared: bool
    reads_layer = True

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Per site (n / size, size, size), shared (1, size, size)."""
        spread = spreading_matrix(self.size, derived_seed(self.seed, "blocks", self.stream))
        return {site: greedy_rotation(layer.statistics[site].samples, spread, self.steps, self.shared) for site in self.sites}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in self.sites:
            turn_online(layer, site, {"operation": "block_rotate", "blocks": parameters[site]})


def spreading_matrix(size: int, seed: int) -> Tensor:
    """An orthogonal (size, size) matrix, float64, with first row 1 / sqrt(size) and the rest Haar among those."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(size, size, generator=generator, dtype=torch.float64)
    columns[:, 0] = 1
    q, r = torch.linalg.qr(columns)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).mT.contiguous()


def greedy_rotation(samples: Tensor, spread: Tensor, steps: int, shared: bool = False) -> Tensor:
    """Orthogonal blocks (n / size, size, size), ``shared`` one of (1, size, size), float64, from tokens (tokens, n) and the matrix of a step
    (size, size)."""
    size = len(spread)
    x = samples.float().reshape(1, -1, size) if shared else samples.float().unflatten(-1, (-1, size)).transpose(0, 1)
    blocks = len(x)
    rotation = torch.eye(size, dtype=torch.float64).repeat(blocks, 1, 1)
    best, least = rotation, x.abs().amax((1, 2))
    every = torch.arange(blocks)
    for _ in range(steps):
        peak, order = x.abs().amax(1).argmax(1), torch.arange(size).repeat(blocks, 1)
        order[every, peak], order[:, 0] = 0, peak
        step = spread[order.unsqueeze(2), order.unsqueeze(1)]  # E M E of every block
        x, rotation = x @ step.float(), rotation @ step
        found = x.abs().amax((1, 2))
        best, least = torch.where((found < least)[:, None, None], rotation, best), torch.minimum(found, least)
    return best
