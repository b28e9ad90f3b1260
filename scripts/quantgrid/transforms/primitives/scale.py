"""Primitive: channel scaling of a site's input by 1/s, columns of its linears by s (SmoothQuant).

The division moves into the norm gain (``attention_input``, ``mlp_input``), into the rows of the value
projection (``output_input``, one factor per KV channel, shared by the query heads of a group; behind linear
attention into the gain of its norm, shared by all heads) or of
the up projection (``down_input``, exact since SwiGLU is linear in ``up``, ReLU of degree 1 and its
square of degree 2).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...ground.errors import ConfigError
from ...inference.transform import Primitive
from ...models.plans import kind_of
from ...models.shapes import ModelShape


def divide_input(layer: DecoderLayer, site: str, s: Tensor, online: bool = False) -> None:
    """Fold x̃ = x / s at ``site``; ``s`` (n,) positive, at ``output_input`` (groups of heads x head_dim,).

    An online shift is divided as well. Any other online operation blocks the division from moving into
    the weights before it, and a site may have no weights that could take it: there it runs online, if
    ``online`` accepts that, or :class:`ConfigError` is raised.
    """
    weights, columns, read = layer.weights, widened(s, site, layer.shape), layer.plan.sites[site]
    if not read.is_divisible and not online:
        raise ConfigError(f"no weights of a {layer.shape.architecture} can take a division of '{site}'; divide online")
    at_run_time = online and (not read.is_divisible or bool(layer.blocking(site)))
    for linear in read.linears if at_run_time else read.consumers:
        weights[linear] = weights[linear] * columns
    if at_run_time:
        operation = {"operation": "multiply", "factor": 1 / columns}
        layer.add_online(site, operation, lambda statistics: statistics.transformed(1 / columns))
        return
    layer.require_foldable(site)
    before, divisor = (read.norm, s) if read.norm is not None else (read.source, s ** (1 / read.degree))
    weights[before] = weights[before] / divisor.view(-1, *[1] * (weights[before].dim() - 1))
    if f"{before}_bias" in weights:
        weights[f"{before}_bias"] = weights[f"{before}_bias"] / divisor
    layer.map_input(site, 1 / columns)


def widened(values: Tensor, site: str, shape: ModelShape) -> Tensor:
    """Expand ``values`` to one per input channel of ``site``.

    At ``output_input`` the heads of a group share the value of a channel.
    """
    if kind_of(site) != "output_input":
        return values
    heads = shape.heads_at(site)
    return values.view(heads.groups, 1, heads.size).expand(-1, heads.count // heads.groups, -1).reshape(-1)


def per_group(values: Tensor, site: str, shape: ModelShape) -> Tensor:
    """Maximum over the heads of a group at ``output_input``: (heads x head_dim,) -> (groups x head_dim,)."""
    if kind_of(site) != "output_input":
        return values
    heads = shape.heads_at(site)
    return values.view(heads.groups, -1, heads.size).amax(1).reshape(-1)


def activation_magnitude(layer: DecoderLayer, site: str, statistic: str) -> Tensor:
    """Magnitude of the input channels of ``site`` by :meth:`SiteStatistics.magnitude`.

    At ``output_input`` it is the largest of a group of heads.
    """
    return per_group(layer.statistics[site].magnitude(statistic), site, layer.shape)


def weight_magnitude(layer: DecoderLayer, site: str) -> Tensor:
    """Column magnitude max_i|W_ij| over the linears of ``site``; at ``output_input`` the largest of a group
    of heads."""
    linears = layer.plan.sites[site].linears
    values = torch.stack([layer.weights[linear].abs().amax(0) for linear in linears]).amax(0)
    return per_group(values, site, layer.shape)


def smoothing_factors(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s = activation^alpha / weight^(1-alpha), at least 1e-5; 1 where either is zero."""
    s = (activation**alpha / weight ** (1 - alpha)).clamp(min=1e-5)
    return torch.where((activation > 0) & (weight > 0), s, torch.ones_like(s))


@dataclass
class Scale(Primitive):
    """SmoothQuant (arXiv 2211.10438): s_j = max|x_j|^alpha / max_i|W_ij|^(1-alpha).

    The maximum is over the weights that share the site. ``statistic``: ``maximum`` as published, or
    the ``mean`` magnitude or ``rms`` of the channel. A channel that is zero in the calibration or
    in all weights keeps s = 1. After a rotation maximum and mean are estimates from the token
    sample. ``online``: divide at run time where no weights can take the division.
    """

    alpha: float
    sites: list[str]
    statistic: str = "maximum"
    online: bool = field(default=False, kw_only=True)
    reads_layer = True

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        return {
            site: smoothing_factors(
                activation_magnitude(layer, site, self.statistic), weight_magnitude(layer, site), self.alpha
            )
            for site in layer.plan.sites_of(self.sites)
        }

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in layer.plan.sites_of(self.sites):
            divide_input(layer, site, parameters[site], self.online)
