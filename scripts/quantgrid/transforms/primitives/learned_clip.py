"""Primitives: learned clipping of weight ranges and of dynamic input ranges.

A learned ratio multiplies the range of every scale block of a weight (OmniQuant, arXiv 2308.13137),
or of every range computed at run time at the input of a site (FlatQuant, arXiv 2410.09426).
Clipping does not preserve the function, so it is not part of the folded weight or of the online
operations: the layer stores the ratios (``DecoderLayer.clips``, ``input_clips``).
``quantize_model`` clamps a weight right before its mitigation rounds it, and the running model
clamps an input right before rounding. The min-max range is then the learned one. Errors are
measured against the weight before the clamp; a low-rank term compensates the clamped weight only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...inference.linear import CLIP
from ...inference.transform import Primitive
from ...quantizer.ranges import clamp_ranges
from ...schemes.cell_schemes import CellSchemes
from ...schemes.quant_scheme import QuantScheme

START = 1 / (1 + math.exp(-4))  # initial value of OmniQuant: sigmoid(4)


def clamp_weight(weight: Tensor, low: Tensor, high: Tensor, symmetric: bool) -> Tensor:
    """Clamp every block of ``weight`` (m, n) to [low x its minimum, high x its maximum].

    ``low``, ``high`` (m, blocks), in (0, 1]. ``symmetric`` clamps to plus and minus the larger
    magnitude of the two ends, because a symmetric scheme has one scale for both.
    """
    return clamp_ranges(weight, low, high, weight.shape[-1] // low.shape[-1], symmetric)


@dataclass
class LearnedClip(Primitive):
    """Clip ratios of every linear, per row or, with ``group_size``, per group of a row."""

    group_size: int | None
    symmetric: bool
    learns: ClassVar[dict[str, str]] = {"low": "fraction", "high": "fraction"}

    @classmethod
    def of(cls, scheme: QuantScheme | None) -> list[LearnedClip]:
        """Clipping of the blocks of a weight scheme; empty if weights are not rounded."""
        return [] if scheme is None else [cls(scheme.group_size, scheme.symmetric)]

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        sizes = {linear: layer.shape.linear_size(linear) for linear in layer.plan.linears}
        blocks = {linear: (m, n // (self.group_size or n)) for linear, (m, n) in sizes.items()}
        return {
            f"{linear}.{end}": torch.full(size, START, dtype=torch.float64)
            for linear, size in blocks.items()
            for end in ("low", "high")
        }

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for linear in layer.plan.linears:
            layer.clips[linear] = partial(
                clamp_weight,
                low=parameters[f"{linear}.low"],
                high=parameters[f"{linear}.high"],
                symmetric=self.symmetric,
            )


@dataclass
class LearnedInputClip(Primitive):
    """Clip ratios of the inputs of ``sites``, two per site, for ranges computed at run time.

    Such ranges belong to a token or a group.
    """

    sites: list[str]
    learns: ClassVar[dict[str, str]] = dict.fromkeys(CLIP, "fraction")

    @classmethod
    def of(cls, schemes: CellSchemes) -> list[LearnedInputClip]:
        """Clipping of all inputs with ranges computed at run time; empty if there are none."""
        sites = [
            site
            for site, candidates in schemes.activation.items()
            if all(scheme.granularity != "tensor" for scheme in candidates)
        ]
        return [cls(sites)] if sites else []

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        return {
            f"{site}.{end}": torch.tensor(START, dtype=torch.float64)
            for site in layer.plan.sites_of(self.sites)
            for end in CLIP
        }

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in layer.plan.sites_of(self.sites):
            layer.input_clips[site] = {end: parameters[f"{site}.{end}"].float() for end in CLIP}
