"""Primitive: constant z subtracted from the input of a site, compensated by W z in the biases.

Outlier Suppression+ (arXiv 2304.09145). At ``output_input`` z moves into the bias of v, exactly where
attention weights sum to 1: not with sinks or behind a gate. RMSNorm and SwiGLU have no bias for it: at the
other sites the subtraction stays online, before all other online operations. Linears without a bias get one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...inference.transform import Primitive
from ...models.plans import kind_of
from ...models.shapes import ModelShape
from .scale import widened


def subtract_input(layer: DecoderLayer, site: str, z: Tensor) -> None:
    """Fold x̃ = x - z at ``site``; ``z`` (n,), at ``output_input`` (groups of heads x head_dim,)."""
    columns = widened(z, site, layer.shape)
    for linear in layer.plan.sites[site].linears:
        layer.add_bias(linear, layer.weights[linear] @ columns)
    read = layer.plan.sites[site]
    if read.shifts and read.source is not None:
        layer.require_foldable(site)
        layer.add_bias(read.source, -z)
        layer.shift_input(site, columns)
    else:
        layer.add_online(
            site, {"operation": "subtract", "shift": columns}, lambda statistics: statistics.shifted(columns)
        )


def by_channel(values: Tensor, site: str, shape: ModelShape) -> Tensor:
    """Reshape rows (k, n) at ``site`` to rows of the channels with a separate z.

    At ``output_input`` the result is (k x heads of a group, groups x head_dim).
    """
    if kind_of(site) != "output_input":
        return values
    heads = shape.heads_at(site)
    rows = values.unflatten(-1, (heads.groups, -1, heads.size)).transpose(-3, -2)
    return rows.reshape(-1, heads.groups * heads.size)


@dataclass
class Shift(Primitive):
    """z of every channel from calibration.

    ``center`` is the ``median`` of the token sample, E[x] (``mean``) or (max + min) / 2
    (``midrange``, as published). A few tokens with massive activations (often first tokens)
    determine the midrange of a channel, and its mean if they are large enough: all other tokens are
    then shifted. Such tokens are up to a fifth of the sample, more than in the text; the median is
    robust to that. At ``output_input`` the query heads that share a KV head share z.
    """

    center: str
    sites: list[str]
    reads_layer = True

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        return {site: self._center(layer, site) for site in layer.plan.sites_of(self.sites)}

    def _center(self, layer: DecoderLayer, site: str) -> Tensor:
        found = layer.statistics[site]
        if self.center == "mean":
            return by_channel(found.mean[None], site, layer.shape).mean(0)
        if self.center == "midrange":
            low, high = (by_channel(end[None], site, layer.shape) for end in (found.minimum, found.maximum))
            return (low.amin(0) + high.amax(0)) / 2
        tokens = by_channel(found.samples, site, layer.shape).double()
        return (
            tokens.median(0).values - (-tokens).median(0).values
        ) / 2  # for an even number the mean of the middle two

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in layer.plan.sites_of(self.sites):
            subtract_input(layer, site, parameters[site])
