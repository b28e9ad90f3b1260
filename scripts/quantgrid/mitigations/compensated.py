"""What every mitigation returns: the quantized weight, an optional low-rank term beside it, and what it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..quantizer import QuantizedTensor


@dataclass(frozen=True)
class Compensated:
    """``quantized`` stands for (*batch, m, n); ``low_rank`` is (left (*batch, m, r), right (*batch, r, n)) or None.

    ``details`` records what a reader of the result should know, such as the damping that was needed.
    """

    quantized: QuantizedTensor
    low_rank: tuple[Tensor, Tensor] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def dequantized(self) -> Tensor:
        """The weight that the model computes with, low-rank term included, float32 (*batch, m, n)."""
        weight = self.quantized.dequantize()
        if self.low_rank is None:
            return weight
        left, right = self.low_rank
        return weight + left.to(weight) @ right.to(weight)
