"""Primitive: channels of a site's input divided by s, columns of its linears multiplied by s (methods of SmoothQuant's kind).

Always offline. The division goes into the norm gain (``attention_input``, ``mlp_input``), into the rows of the value projection
(``output_input``, one factor per KV channel, shared by the query heads of a group) or of the up projection (``down_input``, exact
since SwiGLU is linear in ``up``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..architecture import NORM_OF, SITES, ModelShape
from ..decoders import DecoderLayer


def divide_input(layer: DecoderLayer, site: str, s: Tensor) -> None:
    """Fold x̃ = x / s at ``site``; ``s`` (n,) positive, at ``output_input`` (KV heads x head_dim,).

    An online shift is divided as well. After another online operation the division can no longer move into the weights before it:
    :class:`ConfigError`.
    """
    layer.require_foldable(site)
    weights, columns = layer.weights, widened(s, site, layer.shape)
    if site in NORM_OF:
        weights[NORM_OF[site]] = weights[NORM_OF[site]] / s
    else:
        source = "v" if site == "output_input" else "up"
        weights[source] = weights[source] / s.unsqueeze(-1)
        if f"{source}_bias" in weights:
            weights[f"{source}_bias"] = weights[f"{source}_bias"] / s
    for linear in SITES[site]:
        weights[linear] = weights[linear] * columns
    layer.map_input(site, 1 / columns)


def widened(values: Tensor, site: str, shape: ModelShape) -> Tensor:
    """One value per input channel of ``site``: at ``output_input`` a value per KV channel is repeated for the query heads that share it."""
    if site != "output_input":
        return values
    return values.view(shape.kv_heads, 1, shape.head_dim).expand(-1, shape.heads // shape.kv_heads, -1).reshape(-1)


def per_kv_channel(values: Tensor, shape: ModelShape) -> Tensor:
    """Maximum over the query heads that share a KV head: (heads x head_dim,) -> (KV heads x head_dim,)."""
    return values.view(shape.kv_heads, -1, shape.head_dim).amax(1).reshape(-1)


def activation_magnitude(layer: DecoderLayer, site: str, statistic: str) -> Tensor:
    """Size of the input channels of ``site`` by :meth:`SiteStatistics.magnitude`; at ``output_input`` of KV channels, the largest of a group."""
    values = layer.statistics[site].magnitude(statistic)
    return per_kv_channel(values, layer.shape) if site == "output_input" else values


def weight_magnitude(layer: DecoderLayer, site: str) -> Tensor:
    """max_i|W_ij| over the linears of ``site``; at ``output_input`` per KV channel."""
    values = torch.cat([layer.weights[linear].abs() for linear in SITES[site]]).amax(0)
    return per_kv_channel(values, layer.shape) if site == "output_input" else values


def smoothing_factors(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s = activation^alpha / weight^(1-alpha), at least 1e-5; 1 where either is zero."""
    s = (activation ** alpha / weight ** (1 - alpha)).clamp(min=1e-5)
    return torch.where((activation > 0) & (weight > 0), s, torch.ones_like(s))


@dataclass
class Scale:
    """SmoothQuant (arXiv 2211.10438): s_j = max|x_j|^alpha / max_i|W_ij|^(1-alpha) over the weights that share the site.

    ``statistic``: ``maximum`` as published, or the ``mean`` magnitude or ``rms`` of the channel in its place. A channel that is zero in the
    calibration or in all weights keeps s = 1. After a rotation maximum and mean are estimates from the token sample.
    """

    alpha: float
    sites: list[str]
    statistic: str = "maximum"
    reads_layer = True

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        return {site: smoothing_factors(activation_magnitude(layer, site, self.statistic), weight_magnitude(layer, site), self.alpha)
                for site in self.sites}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in self.sites:
            divide_input(layer, site, parameters[site])

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: all of it happens inside the layers."""
