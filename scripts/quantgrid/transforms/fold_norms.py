"""The gains of the norms folded into the linears behind them, and nothing rotated: what R1 does first (QuaRot, arXiv 2404.00456), by itself.

The weights then answer for what the gains did. A channel of the residual stream that its gain keeps small reaches the folded linear at full size,
and the rounding error of its column, no smaller than that of others in the row, with it. The final norm stays: its lm_head is not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..architecture import NORM_OF, ModelShape
from ..decoders import DecoderLayer
from .rotate import absorb_norm


@dataclass
class FoldNorms:
    """Both norms of every layer get gains of one. Offline, without parameters."""

    reads_layer = False

    def fit_model(self, shape: ModelShape) -> dict[str, Tensor]:
        return {}

    def fit_layer(self, layer: DecoderLayer) -> dict[str, Tensor]:
        return {}

    def fold_layer(self, layer: DecoderLayer, parameters: dict[str, Tensor]) -> None:
        for site in NORM_OF:
            layer.require_foldable(site)
            absorb_norm(layer, site)

    def fold_ends(self, ends: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Nothing: neither embedding nor lm_head is rounded."""


def primitives(seed: int | None = None) -> list:
    return [FoldNorms()]
