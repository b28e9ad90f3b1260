"""Primitives whose parameters are learned: rotations that start as the identity, scales that start at one or where SmoothQuant puts them.

They fold as the fixed ones do (``rotate.py``, ``scale.py``). ``learns`` says how the last part of a parameter's name is kept in its set
while it is trained (``learning/trainables.py``); ``fit_model`` and ``fit_layer`` give the start. ``input_map`` is the same change as a map of
the input of a site and its inverse, for a training that leaves the weights as they are (``learning/network.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..architecture import NORM_OF, SITES, ModelShape
from ..decoders import DecoderLayer
from ..statistics import Rows
from .composition import InputMap
from .rotate import RotateResidual
from .scale import Scale, divide_input, widened


@dataclass
class TurnResidual(RotateResidual):
    """A learned R1 on top of the fixed one before it: ``matrix`` (d, d) orthogonal, at first the identity."""

    kind: str = "learned"
    seed: int | None = None
    learns: ClassVar[dict[str, str]] = {"matrix": "rotation"}

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {"matrix": torch.eye(shape.hidden_size, dtype=torch.float64)}

    def input_map(self, site: str, shape: ModelShape, parameters: dict[str, Tensor]) -> InputMap | None:
        matrix = parameters["matrix"]
        return (lambda x: x @ matrix, lambda x: x @ matrix.mT) if site in NORM_OF else None


@dataclass
class TurnHeads:
    """A learned R2 on top of the fixed one before it: ``matrix`` (KV heads, head_dim, head_dim) orthogonal, at first identities. Offline."""

    reads_layer = False
    learns: ClassVar[dict[str, str]] = {"matrix": "rotation"}

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        shape = layer.shape
        return {"matrix": torch.eye(shape.head_dim, dtype=torch.float64).repeat(shape.kv_heads, 1, 1)}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        weights, rows = layer.weights, self._rows(layer.shape, parameters["matrix"])
        weights["v"] = rows(weights["v"].mT).mT
        if "v_bias" in weights:
            weights["v_bias"] = rows(weights["v_bias"])
        weights["o"] = rows(weights["o"])
        layer.map_input("output_input", rows)

    def _rows(self, shape: ModelShape, matrix: Tensor) -> Rows:
        """x (..., heads or KV heads x head_dim) -> the same shape, every head times the matrix of its KV head."""

        def rows(x: Tensor) -> Tensor:
            heads = x.unflatten(-1, (shape.kv_heads, -1, shape.head_dim))
            return torch.einsum("...gqi,gij->...gqj", heads, matrix.to(x)).flatten(-3)

        return rows

    def input_map(self, site: str, shape: ModelShape, parameters: dict[str, Tensor]) -> InputMap | None:
        matrix = parameters["matrix"]
        return (self._rows(shape, matrix), self._rows(shape, matrix.mT)) if site == "output_input" else None

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: values live inside the layers."""


@dataclass
class LearnedScale:
    """Channel scales at ``sites``, started at SmoothQuant's for ``alpha``, or at one where ``alpha`` is None."""

    alpha: float | None
    sites: list[str]
    learns: ClassVar[dict[str, str]] = dict.fromkeys(SITES, "positive")

    @property
    def reads_layer(self) -> bool:
        return self.alpha is not None

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        if self.alpha is not None:
            return Scale(self.alpha, self.sites).fit_layer(layer)
        shape = layer.shape
        sizes = {site: shape.kv_heads * shape.head_dim if site == "output_input" else shape.site_size(site) for site in self.sites}
        return {site: torch.ones(size, dtype=torch.float64) for site, size in sizes.items()}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in self.sites:
            divide_input(layer, site, parameters[site])

    def input_map(self, site: str, shape: ModelShape, parameters: dict[str, Tensor]) -> InputMap | None:
        if site not in self.sites:
            return None
        columns = widened(parameters[site], site, shape)
        return (lambda x: x / columns, lambda x: x * columns)

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: scales live inside the layers."""
