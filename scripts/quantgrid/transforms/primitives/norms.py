"""Primitive: norm gains folded into the linears behind them, without a rotation.

The weights then contain the gains. A residual channel with a small gain enters the folded linear at
full size, and amplifies the rounding error of its column, which is no smaller than that of others
in the row. The final norm stays: its lm_head is not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...calibration.layers import DecoderLayer
from ...inference.transform import Primitive
from .stream import absorb_norm


@dataclass
class FoldNorms(Primitive):
    """Set the gains of both norms of every layer to one. Offline, without parameters.

    Embedding and lm_head are not rounded, so they are unchanged.
    """

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in layer.plan.stream_sites:
            layer.require_foldable(site.name)
            absorb_norm(layer, site.name)
