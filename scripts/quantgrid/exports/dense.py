"""Dense folders: dequantized weights, with low-rank terms added, in the dtype of the model."""

from __future__ import annotations

from torch import Tensor

from .packed_cell import ExportLayer
from .packer import Packer


class Dense(Packer):
    """Packer of dense folders."""

    def linears(self, layer: ExportLayer) -> dict[str, Tensor]:
        """Weights of the linears of a layer."""
        found = {}
        for linear in layer.linears:
            weight = linear.dense()
            if linear.low_rank is not None:
                left, right = linear.low_rank
                weight = weight + left @ right
            found[f"{linear.name}.weight"] = weight.to(self.dtype)
        return found
