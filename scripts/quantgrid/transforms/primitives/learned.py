"""Primitives with learned parameters: rotations initialized to the identity, and channel scales.

Scales start at one or at SmoothQuant's. Folding is that of the fixed primitives (``rotate.py``,
``scale.py``). ``learns`` maps a part of a parameter's name to its parametrization
(``learning/trainables.py``); ``fit_model`` and ``fit_layer`` give the initial values. ``input_map``
adds the same change to the map of a site's input (``inference/input_maps.py``), for trainings with
unchanged weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...calibration.statistics import Rows
from ...inference.input_maps import InputMap
from ...inference.transform import Primitive
from ...models.plans import SITES, kind_of
from ...models.shapes import ModelShape
from .rotate import RotateResidual, by_head, turn_heads
from .scale import Scale, divide_input, per_group


@dataclass
class LearnedR1(RotateResidual):
    """Learned R1 on top of the fixed one before it: ``matrix`` (d, d) orthogonal, initially I."""

    kind: str = "learned"
    seed: int | None = None
    learns: ClassVar[dict[str, str]] = {"matrix": "rotation"}

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {"matrix": torch.eye(shape.hidden_size, dtype=torch.float64)}

    def input_map(self, site: str, shape: ModelShape, parameters: dict[str, Tensor], before: InputMap) -> InputMap:
        stream = [read.name for read in shape.family.plan.stream_sites]
        return before.rotated(parameters["matrix"][None]) if site in stream else before


@dataclass
class LearnedR2(Primitive):
    """Learned R2 on top of the fixed one before it. Offline, or ``online`` as :class:`RotateHeads`.

    ``matrix`` (groups of heads, head_dim, head_dim) orthogonal, initially identities.
    """

    online: bool = field(default=False, kw_only=True)
    learns: ClassVar[dict[str, str]] = {"matrix": "rotation"}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        (site,) = layer.plan.sites_of(["output_input"])
        heads = layer.shape.heads_at(site)
        return {"matrix": torch.eye(heads.size, dtype=torch.float64).repeat(heads.groups, 1, 1)}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        (site,) = layer.plan.sites_of(["output_input"])
        heads, matrix = layer.shape.heads_at(site), parameters["matrix"]
        operation = {"operation": "block_rotate", "blocks": by_head(matrix, heads)}
        turn_heads(layer, site, _turned(matrix), [operation] if self.online else [])

    def input_map(self, site: str, shape: ModelShape, parameters: dict[str, Tensor], before: InputMap) -> InputMap:
        return before.rotated(parameters["matrix"]) if kind_of(site) == "output_input" else before


def _turned(matrix: Tensor) -> Rows:
    """Multiply every head of x (..., heads or groups x head_dim) by the matrix of its group."""

    def rows(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (len(matrix), -1, matrix.shape[-1]))
        return torch.einsum("...gqi,gij->...gqj", heads, matrix.to(x)).flatten(-3)

    return rows


@dataclass
class LearnedScale(Primitive):
    """Channel scales at ``sites``, initially SmoothQuant's for ``alpha``; one for ``alpha`` None.

    ``online``: divide at run time where no weights can take the division.
    """

    alpha: float | None
    sites: list[str]
    online: bool = field(default=False, kw_only=True)
    learns: ClassVar[dict[str, str]] = dict.fromkeys(SITES, "positive")

    @property
    def reads_layer(self) -> bool:
        return self.alpha is not None

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        if self.alpha is not None:
            return Scale(self.alpha, self.sites).fit_layer(layer)
        return {
            site: per_group(torch.ones(layer.shape.site_size(site), dtype=torch.float64), site, layer.shape)
            for site in layer.plan.sites_of(self.sites)
        }

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in layer.plan.sites_of(self.sites):
            divide_input(layer, site, parameters[site], self.online)

    def input_map(self, site: str, shape: ModelShape, parameters: dict[str, Tensor], before: InputMap) -> InputMap:
        if kind_of(site) not in self.sites:
            return before
        groups = shape.heads_at(site).groups if kind_of(site) == "output_input" else 1
        return before.divided(parameters[site].view(groups, -1))
