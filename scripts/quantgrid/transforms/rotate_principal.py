"""Primitive: R1 that starts from principal axes of the model (KLT), of the residual stream's activations or of the weights that read it.

OSTQuant (arXiv 2501.13987) offers the eigenvectors of the stacked rows of q, k, v, gate and up times a random Hadamard matrix as start
of its R1 (``use_klt``); here that product is a fixed rotation of its own, and the second moment of the activations is a second source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architecture import NORM_OF, SITES
from ..decoders import DecoderLayer
from ..statistics import Rows
from .rotate import RotateResidual


@dataclass
class RotatePrincipal(RotateResidual):
    """x -> (x V) R: V the eigenvectors, largest eigenvalue first, of a second moment summed over all layers, R as in :class:`RotateResidual`.

    ``source``: ``activations``, the inputs of q, k, v and of gate, up before the norm's gain, all of one length; ``weights``, the rows of
    q, k, v, gate and up with the gain in them.
    """

    source: str

    def fit_layers(self, layers: Iterable[DecoderLayer]) -> dict[str, Tensor]:
        """``basis`` (d, d); of the two signs of an eigenvector the one that makes its largest entry positive."""
        total = sum(self._moment(layer, site) for layer in layers for site in NORM_OF)
        basis = torch.linalg.eigh(total).eigenvectors.flip(-1)
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        return {"basis": basis * largest.sign()}

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
