"""Primitive: weight clipping of least output error (AWQ, arXiv 2306.00978, its second search).

Clipping does not preserve the function, so it is not part of the folded weight: it limits the input
of the mitigation, as learned clipping does (``learned_clip.py``). Put it last: it does not account
for later changes of the weights.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from functools import partial

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...inference.transform import Primitive
from ...quantizer.tensors import fake_quantize
from ...schemes.cell_schemes import CellSchemes


@dataclass
class SearchedClip(Primitive):
    """Clipping fraction p of the largest magnitude, per row and group of a weight.

    p goes from 1 in ``steps`` equal steps towards 1/2 and minimizes e C eᵀ, e the error of the
    clipped and rounded group and C the second moment of its inputs (the diagonal block: each group
    separately, as published). A scheme with one scale per tensor gets one p. ``schemes`` are used
    in the fit only and not stored.
    """

    linears: list[str]
    steps: int
    schemes: InitVar[CellSchemes | None] = None
    reads_layer = True

    def __post_init__(self, schemes: CellSchemes | None) -> None:
        self.cell = schemes

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Fit ``{linear}``: the largest remaining magnitude, (rows or 1, groups), float32."""
        if self.cell is None or self.cell.weight is None:
            return {}
        return {
            linear: self._bounds(
                layer.weights[linear].float(), layer.statistics[layer.plan.site_of[linear]].second_moment.float()
            )
            for linear in layer.plan.linears_of(self.linears)
        }

    def _bounds(self, weight: Tensor, moment: Tensor) -> Tensor:
        rows, groups = self.cell.weight.scale_shape(weight.shape)[-2:]
        size = weight.shape[-1] // groups
        blocks = torch.stack([moment[i : i + size, i : i + size] for i in range(0, weight.shape[-1], size)])
        largest = weight.abs().unflatten(-1, (groups, size)).amax(-1)
        largest = largest.amax(0, keepdim=True) if rows == 1 else largest
        best, bounds = torch.full_like(largest, torch.inf), largest
        for step in range(self.steps):
            bound = largest * (1 - step / (2 * self.steps))
            error = (
                (fake_quantize(clipped(weight, bound), self.cell.weight.separate) - weight)
                .unflatten(-1, (groups, size))
                .transpose(0, 1)
            )
            found = ((error @ blocks) * error).sum(-1).mT
            found = found.sum(0, keepdim=True) if rows == 1 else found
            best, bounds = torch.minimum(best, found), torch.where(found < best, bound, bounds)
        return bounds

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for linear in layer.plan.linears_of(self.linears):
            if linear in parameters:
                layer.clips[linear] = partial(clipped, bounds=parameters[linear])


def clipped(weight: Tensor, bounds: Tensor) -> Tensor:
    """Clamp ``weight`` (m, n) to +- ``bounds`` (m or 1, groups)."""
    limit = bounds.to(weight).unsqueeze(-1)
    return weight.unflatten(-1, (bounds.shape[-1], -1)).clamp(-limit, limit).flatten(-2)
