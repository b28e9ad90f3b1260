"""Primitives: permutations of a site's channels. Offline where the weights before the site can be permuted as well, else an online gather.

Offline are ``down_input`` (rows of gate and up) and ``output_input`` as long as a channel stays in its KV head (rows of v). The norm outputs
need a gather: the residual stream has one order for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..architecture import SITES, ModelShape
from ..decoders import DecoderLayer
from .block_rotate import InBlocks
from .scale import activation_magnitude


def permute_online(layer: DecoderLayer, site: str, order: Tensor) -> None:
    """Channel ``order[j]`` (n,) comes to place j at ``site``, by an online gather."""
    for linear in SITES[site]:
        layer.weights[linear] = layer.weights[linear][:, order]
    layer.add_online(site, {"operation": "gather", "order": order}, lambda statistics: statistics.permuted(order))


def permute_offline(layer: DecoderLayer, site: str, order: Tensor) -> None:
    """The same at ``down_input``, ``order`` (n,), or ``output_input``, ``order`` (KV heads, head_dim) within each head, in the weights."""
    layer.require_foldable(site)
    shape, columns = layer.shape, order
    if site == "output_input":
        within = order.repeat_interleave(shape.heads // shape.kv_heads, 0)
        columns = (within + torch.arange(shape.heads).unsqueeze(-1) * shape.head_dim).flatten()
        order = (order + torch.arange(shape.kv_heads).unsqueeze(-1) * shape.head_dim).flatten()
    for source in ("v",) if site == "output_input" else ("gate", "up"):
        for role in (source, f"{source}_bias"):
            if role in layer.weights:
                layer.weights[role] = layer.weights[role][order]
    for linear in SITES[site]:
        layer.weights[linear] = layer.weights[linear][:, columns]
    layer.map_input(site, lambda x: x[..., columns], lambda statistics: statistics.permuted(columns))


@dataclass
class Reorder:
    """Channels in ascending order of their magnitude, the largest last (Atom, arXiv 2310.19102): groups hold channels of one size.

    ``statistic``: ``maximum``, ``mean`` or ``rms`` (Atom sums squares, which is ``rms``). ``heads``: ``across`` orders all channels of
    ``output_input``, online; ``within`` those of each KV head, offline.
    """

    statistic: str
    sites: list[str]
    heads: str
    reads_layer = True

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Per site the order, whole numbers (n,), or (KV heads, head_dim) within heads."""
        found = {}
        for site in self.sites:
            if site == "output_input" and self.heads == "within":
                values = activation_magnitude(layer, site, self.statistic).view(layer.shape.kv_heads, -1)
            else:
                values = layer.statistics[site].magnitude(self.statistic)
            found[site] = values.argsort(stable=True)
        return found

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in self.sites:
            offline = site == "down_input" or (site == "output_input" and self.heads == "within")
            (permute_offline if offline else permute_online)(layer, site, parameters[site])

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: all of it happens inside the layers."""


@dataclass
class Zigzag(InBlocks):
    """DuQuant's permutation (arXiv 2406.01721): channels by descending maximum dealt to the blocks back and forth, so that every block of
    ``size`` gets its share of large ones. Online."""

    reads_layer = True

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Per site the order, whole numbers (n,)."""
        return {site: zigzag(layer.statistics[site].maximum_absolute, self.size) for site in self.sites}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in self.sites:
            permute_online(layer, site, parameters[site])


def zigzag(values: Tensor, size: int) -> Tensor:
    """The order (n,) that deals channels by descending ``values`` (n,) to blocks of ``size``: first to last, then last to first, and so on."""
    rounds = values.argsort(descending=True, stable=True).view(size, -1).clone()
    rounds[1::2] = rounds[1::2].flip(-1)
    return rounds.mT.flatten()
