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
    shape, weights = layer.shape, layer.weights
    columns = s
    if site in NORM_OF:
        weights[NORM_OF[site]] = weights[NORM_OF[site]] / s
    else:
        source = "v" if site == "output_input" else "up"
        weights[source] = weights[source] / s.unsqueeze(-1)
        if f"{source}_bias" in weights:
            weights[f"{source}_bias"] = weights[f"{source}_bias"] / s
    if site == "output_input":
        columns = s.view(shape.kv_heads, 1, shape.head_dim).expand(-1, shape.heads // shape.kv_heads, -1).reshape(-1)
    for linear in SITES[site]:
        weights[linear] = weights[linear] * columns
    layer.map_input(site, 1 / columns)


def per_kv_channel(values: Tensor, shape: ModelShape) -> Tensor:
    """Maximum over the query heads that share a KV head: (heads x head_dim,) -> (KV heads x head_dim,)."""
    return values.view(shape.kv_heads, -1, shape.head_dim).amax(1).reshape(-1)


@dataclass
class Scale:
    """SmoothQuant (arXiv 2211.10438): s_j = max|x_j|^alpha / max_i|W_ij|^(1-alpha) over the weights that share the site.

    A channel that is zero in the calibration or in all weights keeps s = 1. After a rotation max|x_j| is an estimate from the
    token sample.
    """

    alpha: float
    sites: list[str]
    reads_layer = True

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        return {site: self._factors(layer, site) for site in self.sites}

    def _factors(self, layer: DecoderLayer, site: str) -> Tensor:
        activation = layer.statistics[site].maximum_absolute
        weight = torch.cat([layer.weights[linear].abs() for linear in SITES[site]]).amax(0)
        if site == "output_input":
            activation, weight = per_kv_channel(activation, layer.shape), per_kv_channel(weight, layer.shape)
        s = (activation ** self.alpha / weight ** (1 - self.alpha)).clamp(min=1e-5)
        return torch.where((activation > 0) & (weight > 0), s, torch.ones_like(s))

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in self.sites:
            divide_input(layer, site, parameters[site])

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: all of it happens inside the layers."""
