"""Primitives: R1 and R2 that start from principal axes of the model (KLT): of the weights that read the rotated input, of R1 also of the
activations.

OSTQuant (arXiv 2501.13987) starts R1 from the eigenvectors of the stacked rows of q, k, v, gate and up, and R2 from those of the columns of o
that read a KV head, each times a random Hadamard matrix (``use_klt``). Here these products are fixed rotations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architecture import NORM_OF, SITES, ModelShape
from ..decoders import DecoderLayer
from ..statistics import Rows
from .rotate import RotateHeads, RotateResidual


def principal_axes(moment: Tensor) -> Tensor:
    """Eigenvectors of ``moment`` (*batch, n, n) as columns, largest eigenvalue first; their largest entries are positive."""
    basis = torch.linalg.eigh(moment).eigenvectors.flip(-1)
    return basis * basis.gather(-2, basis.abs().argmax(-2, keepdim=True)).sign()


@dataclass
class RotatePrincipal(RotateResidual):
    """x -> (x V) R: V the eigenvectors, largest eigenvalue first, of a second moment summed over all layers, R as in :class:`RotateResidual`.

    ``source``: ``activations``, the inputs of q, k, v and of gate, up before the norm's gain, all of one length; ``weights``, the rows of
    q, k, v, gate and up with the gain in them.
    """

    source: str

    def fit_layers(self, layers: Iterable[DecoderLayer]) -> dict[str, Tensor]:
        """``basis`` (d, d); of the two signs of an eigenvector the one that makes its largest entry positive."""
        return {"basis": principal_axes(sum(self._moment(layer, site) for layer in layers for site in NORM_OF))}

    def _moment(self, layer: DecoderLayer, site: str) -> Tensor:
        gain = layer.weights[NORM_OF[site]]
        if self.source == "weights":
            rows = torch.cat([layer.weights[linear] for linear in SITES[site]]) * gain
            return rows.mT @ rows
        inverse = torch.where(gain == 0, 0.0, 1 / gain)
        return layer.statistics[site].second_moment.double() * inverse * inverse.unsqueeze(-1)

    def _rows(self, parameters: dict[str, Tensor]) -> Rows:
        rotated = super()._rows(parameters)
        return lambda x: rotated(x @ parameters["basis"].to(x))


@dataclass
class RotateHeadsPrincipal(RotateHeads):
    """x -> (x V) R2 for every KV head: V the eigenvectors of W_hᵀ W_h summed over the query heads h that share it, W_h the columns of o."""

    reads_layer = True

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        shape = layer.shape
        columns = layer.weights["o"].unflatten(-1, (shape.kv_heads, -1, shape.head_dim))
        moment = torch.einsum("mgqi,mgqj->gij", columns, columns)
        return {**super().fit_layer(layer), "basis": principal_axes(moment)}

    def _rows(self, shape: ModelShape, parameters: dict[str, Tensor], inverse: bool = False) -> Rows:
        rotated, basis = super()._rows(shape, parameters, inverse), parameters["basis"]

        def turned(x: Tensor, matrices: Tensor) -> Tensor:
            heads = x.unflatten(-1, (shape.kv_heads, -1, shape.head_dim))
            return (heads @ matrices.to(x)).flatten(-3)

        return (lambda x: turned(rotated(x), basis.mT)) if inverse else (lambda x: rotated(turned(x, basis)))
