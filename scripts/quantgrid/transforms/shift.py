"""Primitive: a constant z subtracted from the input of a site, W z added to the biases of its linears (Outlier Suppression+, arXiv 2304.09145).

At ``output_input`` z moves into the bias of v, exactly, since attention weights sum to 1. RMSNorm and SwiGLU have no bias to take it: at the
other sites the subtraction stays online, before whatever else is online there. Linears without a bias get one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..architecture import SITES, ModelShape
from ..decoders import DecoderLayer
from .scale import widened


def subtract_input(layer: DecoderLayer, site: str, z: Tensor) -> None:
    """x̃ = x - z at ``site``; ``z`` (n,), at ``output_input`` (KV heads x head_dim,)."""
    columns = widened(z, site, layer.shape)
    for linear in SITES[site]:
        _add_bias(layer, linear, layer.weights[linear] @ columns)
    if site == "output_input":
        layer.require_foldable(site)
        _add_bias(layer, "v", -z)
        layer.shift_input(site, columns)
    else:
        layer.add_online(site, {"operation": "subtract", "shift": columns}, lambda statistics: statistics.shifted(columns))


def _add_bias(layer: DecoderLayer, linear: str, change: Tensor) -> None:
    before = layer.weights.get(f"{linear}_bias")
    layer.weights[f"{linear}_bias"] = change if before is None else before + change


@dataclass
class Shift:
    """z of every channel from calibration: ``center`` ``mean`` is E[x], ``midrange`` is (max + min) / 2, as published.

    Where the first token has massive activations the midrange moves all other tokens by half of its own. At ``output_input`` the query heads
    that share a KV head share z.
    """

    center: str
    sites: list[str]
    reads_layer = True

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        return {site: self._center(layer, site) for site in self.sites}

    def _center(self, layer: DecoderLayer, site: str) -> Tensor:
        found, shape = layer.statistics[site], layer.shape
        mean, low, high = found.mean, found.minimum, found.maximum
        if site == "output_input":
            mean, low, high = (values.view(shape.kv_heads, -1, shape.head_dim) for values in (mean, low, high))
            mean, low, high = mean.mean(1).flatten(), low.amin(1).flatten(), high.amax(1).flatten()
        return mean if self.center == "mean" else (low + high) / 2

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in self.sites:
            subtract_input(layer, site, parameters[site])

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: all of it happens inside the layers."""
