"""Dense folders: dequantized weights, with low-rank terms added, in the dtype of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantization.packed_linears import PackedLinear
from .packed_cell import ExportLayer
from .packer import Packer


class Dense(Packer):
    """Packer of dense folders."""

    def linears(self, layer: ExportLayer) -> dict[str, Tensor]:
        """Weights of the linears of a layer; those of a joined one are rows of its parts."""
        return {
            f"{name}.weight": torch.cat([values(part) for part in parts]).to(self.dtype)
            for name, parts in layer.parts.items()
        }


def values(linear: PackedLinear) -> Tensor:
    """Values (m, n) of a linear with its low-rank term, float32."""
    weight = linear.dense()
    if linear.low_rank is None:
        return weight
    left, right = linear.low_rank
    return weight + left @ right
