"""Primitives: learned clipping. The range of every scale block of a weight (OmniQuant, arXiv 2308.13137), or of every range that is found
at the input of a site while the model runs (FlatQuant, arXiv 2410.09426), times a learned ratio.

Clipping does not preserve the function, so it is no part of the folded weight or of the online operations: the layer keeps the ratios
(``DecoderLayer.clips``, ``input_clips``). ``quantize_model`` clamps a weight right before its mitigation rounds it, and the running model
an input right before it is rounded. A range found as minimum and maximum is then the learned one. Errors are measured against the
weight before the clamp; a low-rank term compensates the clamped weight only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..architecture import LINEARS, ModelShape
from ..cell_schemes import CellSchemes
from ..decoders import DecoderLayer
from ..linear import CLIP
from ..ranges import clamp_ranges
from ..schemes import QuantScheme

START = 1 / (1 + math.exp(-4))  # OmniQuant's: sigmoid(4)


def clamp_weight(weight: Tensor, low: Tensor, high: Tensor, symmetric: bool) -> Tensor:
    """``weight`` (m, n) with every block within low x its minimum and high x its maximum (``low``, ``high`` (m, blocks), in (0, 1]).

    ``symmetric``: within plus and minus the larger magnitude of the two ends, as a symmetric scheme has one scale for both.
    """
    return clamp_ranges(weight, low, high, weight.shape[-1] // low.shape[-1], symmetric)


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


@dataclass
class LearnedInputClip:
    """Clip ratios of the inputs of ``sites``, two numbers each, for ranges that every token or group finds while the model runs."""

    sites: list[str]
    reads_layer = False
    learns: ClassVar[dict[str, str]] = dict.fromkeys(CLIP, "fraction")

    @classmethod
    def of(cls, schemes: CellSchemes) -> list[LearnedInputClip]:
        """The clipping of all inputs with ranges found at run time; none where there is no such input."""
        sites = [site for site, candidates in schemes.activation.items() if all(scheme.granularity != "tensor" for scheme in candidates)]
        return [cls(sites)] if sites else []

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        return {f"{site}.{end}": torch.tensor(START, dtype=torch.float64) for site in self.sites for end in CLIP}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in self.sites:
            layer.input_clips[site] = {end: parameters[f"{site}.{end}"].float() for end in CLIP}

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: only the inputs of the linears are rounded."""
