"""Primitives: R1 and R2 initialized by principal axes (KLT) of weights or activations.

The weights are those that read the rotated input; activations are an option of R1. OSTQuant (arXiv
2501.13987) starts R1 from the eigenvectors of the stacked rows of q, k, v, gate and up, and R2 from
those of the columns of o that read a KV head, each times a random Hadamard matrix (``use_klt``).
Here these products are fixed rotations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...calibration.statistics import Rows
from ...models.plans import Site
from ...models.shapes import Heads
from .rotate import RotateHeads, RotateResidual


def principal_axes(moment: Tensor) -> Tensor:
    """Eigenvectors of ``moment`` (*batch, n, n) as columns, largest eigenvalue first.

    Their largest entries are positive.
    """
    basis = torch.linalg.eigh(moment).eigenvectors.flip(-1)
    return basis * basis.gather(-2, basis.abs().argmax(-2, keepdim=True)).sign()


@dataclass
class RotatePrincipal(RotateResidual):
    """R1 as x -> (x V) R: V principal axes, R as in :class:`RotateResidual`.

    V are the eigenvectors, largest eigenvalue first, of a second moment summed over all layers.
    ``source``: ``activations``, the inputs of q, k, v and of gate, up before the norm's gain, all
    of one length; ``weights``, the rows of q, k, v, gate and up with the gain in them.
    """

    source: str

    def fit_layers(self, layers: Iterable[DecoderLayer]) -> dict[str, Tensor]:
        """Fit ``basis`` (d, d); the largest entry of each eigenvector is positive."""
        return {
            "basis": principal_axes(
                sum(self._moment(layer, site) for layer in layers for site in layer.plan.stream_sites)
            )
        }

    def _moment(self, layer: DecoderLayer, site: Site) -> Tensor:
        ones = torch.ones(layer.shape.hidden_size, dtype=torch.float64, device=layer.device)
        gain = layer.weights[site.norm] if site.norm else ones
        if self.source == "weights":
            # one expert after another: all of them in float64 do not fit in memory
            groups = [[linear] for linear in site.linears] if site.block else [site.linears]
            stacked = (torch.cat([layer.weights[linear] for linear in group]) * gain for group in groups)
            return sum(rows.mT @ rows for rows in stacked)
        inverse, statistics = torch.where(gain == 0, 0.0, 1 / gain), layer.statistics[site.name]
        if (bias := layer.weights.get(f"{site.norm}_bias")) is not None:
            statistics = statistics.shifted(bias)
        return statistics.second_moment.double() * inverse * inverse.unsqueeze(-1)

    def _rows(self, parameters: dict[str, Tensor]) -> Rows:
        rotated = super()._rows(parameters)
        return lambda x: rotated(x @ parameters["basis"].to(x))


@dataclass
class RotateHeadsPrincipal(RotateHeads):
    """R2 as x -> (x V) R2 for every KV head, V principal axes.

    V are the eigenvectors of W_hᵀ W_h summed over the query heads h that share it, W_h the columns
    of o.
    """

    reads_layer = True

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        (site,) = layer.plan.sites_of(["output_input"])
        heads, (output,) = layer.shape.heads_at(site), layer.plan.sites[site].linears
        columns = layer.weights[output].unflatten(-1, (heads.groups, -1, heads.size))
        moment = torch.einsum("mgqi,mgqj->gij", columns, columns)
        return {**super().fit_layer(layer), "basis": principal_axes(moment)}

    def _rows(self, heads: Heads, parameters: dict[str, Tensor]) -> Rows:
        rotated, parts = super()._rows(heads, parameters), (heads.groups, -1, heads.size)
        return lambda x: rotated((x.unflatten(-1, parts) @ parameters["basis"].to(x)).flatten(-3))
