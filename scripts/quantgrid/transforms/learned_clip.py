"""Primitive: learned weight clipping (OmniQuant, arXiv 2308.13137): the range of every scale block of a weight times a learned ratio.

Clipping does not preserve the function, so it is no part of the folded weight: the layer keeps it beside (``DecoderLayer.clips``), and
``quantize_model`` clamps a weight with it right before its mitigation rounds it. A range found as minimum and maximum is then the
learned one. Errors are measured against the weight before the clamp; a low-rank term compensates the clamped weight only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..architecture import LINEARS, ModelShape
from ..decoders import DecoderLayer
from ..schemes import QuantScheme

START = 1 / (1 + math.exp(-4))  # OmniQuant's: sigmoid(4)


def clamp_weight(weight: Tensor, low: Tensor, high: Tensor, symmetric: bool) -> Tensor:
    """``weight`` (m, n) with every block within low x its minimum and high x its maximum (``low``, ``high`` (m, blocks), in (0, 1]).

    ``symmetric``: within plus and minus the larger magnitude of the two ends, as a symmetric scheme has one scale for both.
    """
    blocks = weight.unflatten(-1, (low.shape[-1], -1))
    smallest, largest = blocks.amin(-1).clamp(max=0) * low.to(weight), blocks.amax(-1).clamp(min=0) * high.to(weight)
    if symmetric:
        largest = torch.maximum(-smallest, largest)
        smallest = -largest
    return blocks.clamp(smallest.unsqueeze(-1), largest.unsqueeze(-1)).flatten(-2)


@dataclass
class LearnedClip:
    """Clip ratios of every linear, per row or, with ``group_size``, per group of it."""

    group_size: int | None
    symmetric: bool
    reads_layer = False
    learns: ClassVar[dict[str, str]] = {"low": "fraction", "high": "fraction"}

    @classmethod
    def of(cls, scheme: QuantScheme | None) -> list[LearnedClip]:
        """The clipping of a weight scheme's blocks; none where weights are not rounded."""
        return [] if scheme is None else [cls(scheme.group_size, scheme.symmetric)]

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        sizes = {linear: layer.shape.linear_size(linear) for linear in LINEARS}
        blocks = {linear: (m, n // (self.group_size or n)) for linear, (m, n) in sizes.items()}
        return {f"{linear}.{end}": torch.full(size, START, dtype=torch.float64) for linear, size in blocks.items() for end in ("low", "high")}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for linear in LINEARS:
            layer.clips[linear] = partial(clamp_weight, low=parameters[f"{linear}.low"], high=parameters[f"{linear}.high"], symmetric=self.symmetric)

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: only the linears of the layers are rounded."""
