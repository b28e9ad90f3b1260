"""Primitives: permutations of a site's channels, offline if possible, else an online gather.

Offline are ``down_input`` (rows of gate and up) and ``output_input`` if channels stay in their KV
head (rows of v). The norm outputs need a gather: the residual stream has one order for all layers.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...ground.errors import ConfigError
from ...inference.transform import Primitive
from ...models.plans import kind_of
from .block_rotate import InBlocks
from .scale import activation_magnitude


def permute_online(layer: DecoderLayer, site: str, order: Tensor) -> None:
    """Permute channels online by a gather: ``order[j]`` (n,) moves to place j at ``site``."""
    for linear in layer.plan.sites[site].linears:
        layer.weights[linear] = layer.weights[linear][:, order]
    layer.add_online(site, {"operation": "gather", "order": order}, lambda statistics: statistics.permuted(order))


def permute_offline(layer: DecoderLayer, site: str, order: Tensor) -> None:
    """Permute channels in the weights before ``site``.

    At ``down_input`` ``order`` is (n,), at ``output_input`` (KV heads, head_dim) within each head; there
    :class:`ConfigError` is raised for attention with a gate.
    """
    layer.require_foldable(site)
    columns, within_heads = order, kind_of(site) == "output_input"
    if within_heads:
        if not layer.plan.sites[site].turns:
            raise ConfigError(f"no order within heads passes the gate before '{site}'; use 'heads: across'")
        heads = layer.shape.heads_at(site)
        within = order.repeat_interleave(heads.count // heads.groups, 0)
        columns, order = (
            (part + torch.arange(len(part), device=part.device).unsqueeze(-1) * heads.size).flatten()
            for part in (within, order)
        )
    last = layer.plan.sites[site].source
    for source in (last,) if within_heads else (last.replace("up", "gate"), last):
        for role in (source, f"{source}_bias"):
            if role in layer.weights:
                layer.weights[role] = layer.weights[role][order]
    for linear in layer.plan.sites[site].consumers:
        layer.weights[linear] = layer.weights[linear][:, columns]
    layer.map_input(site, lambda x: x[..., columns], lambda statistics: statistics.permuted(columns))


@dataclass
class Reorder(Primitive):
    """Sort channels by ascending magnitude (Atom, arXiv 2310.19102): groups have similar channels.

    ``statistic``: ``maximum``, ``mean`` or ``rms`` (Atom sums squares, which is ``rms``).
    ``heads``: ``across`` sorts all channels of ``output_input``, online; ``within`` those of each
    KV head, offline.
    """

    statistic: str
    sites: list[str]
    heads: str
    reads_layer = True

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Order per site, integers (n,), or (KV heads, head_dim) within heads."""
        found = {}
        for site in layer.plan.sites_of(self.sites):
            if kind_of(site) == "output_input" and self.heads == "within":
                groups = layer.shape.heads_at(site).groups
                values = activation_magnitude(layer, site, self.statistic).view(groups, -1)
            else:
                values = layer.statistics[site].magnitude(self.statistic)
            found[site] = values.argsort(stable=True)
        return found

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in layer.plan.sites_of(self.sites):
            offline = kind_of(site) == "down_input" or (kind_of(site) == "output_input" and self.heads == "within")
            (permute_offline if offline else permute_online)(layer, site, parameters[site])


@dataclass
class Zigzag(InBlocks):
    """DuQuant's zigzag permutation (arXiv 2406.01721). Online.

    Channels by descending maximum are dealt to the blocks back and forth, so that large channels
    are spread evenly over blocks of ``size``.
    """

    reads_layer = True

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Order per site, integers (n,)."""
        return {
            site: zigzag(layer.statistics[site].maximum_absolute, self.size) for site in layer.plan.sites_of(self.sites)
        }

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in layer.plan.sites_of(self.sites):
            permute_online(layer, site, parameters[site])


def zigzag(values: Tensor, size: int) -> Tensor:
    """Order (n,) that deals channels by descending ``values`` (n,) to blocks of ``size``.

    Dealing goes from first to last block, then last to first, and so on.
    """
    rounds = values.argsort(descending=True, stable=True).view(size, -1).clone()
    rounds[1::2] = rounds[1::2].flip(-1)
    return rounds.mT.flatten()


@dataclass
class Spread(InBlocks):
    """Permutation that gives all blocks of ``size`` channels a similar mass, offline.

    ``order``: ``mass`` deals channels by falling mean magnitude, each to the block with the least
    sum that has room (:func:`equal_mass`); ``zigzag`` as :func:`zigzag`, by mean magnitude. ``sites``
    are ``down_input``.
    """

    order: str
    reads_layer = True

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Order per site, integers (n,)."""
        orders = {"mass": equal_mass, "zigzag": zigzag}
        return {
            site: orders[self.order](layer.statistics[site].magnitude("mean"), self.size)
            for site in layer.plan.sites_of(self.sites)
        }

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in layer.plan.sites_of(self.sites):
            permute_offline(layer, site, parameters[site])


def equal_mass(values: Tensor, size: int) -> Tensor:
    """Order (n,) that gives blocks of ``size`` similar sums of ``values`` (n,), nonnegative.

    Channels by descending value go to the block with the smallest sum that is not full. Where
    that does not lower the largest sum, the channels keep their places.
    """
    blocks: list[list[int]] = [[] for _ in range(len(values) // size)]
    masses = values.tolist()
    open_blocks = [(0.0, number) for number in range(len(blocks))]
    for channel in values.argsort(descending=True, stable=True).tolist():
        mass, number = heapq.heappop(open_blocks)
        blocks[number].append(channel)
        if len(blocks[number]) < size:
            heapq.heappush(open_blocks, (mass + masses[channel], number))
    order = torch.tensor(blocks).flatten().to(values.device)
    lower = values[order].view(-1, size).sum(-1).max() < values.view(-1, size).sum(-1).max()
    return order if lower else torch.arange(len(values), device=values.device)
