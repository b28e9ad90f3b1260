"""What every mitigation returns: the quantized weight, what it puts beside it (a low-rank term, weights kept in 16 bits), and what it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..quantizer import QuantizedTensor


@dataclass(frozen=True)
class Outliers:
    """Weights that keep 16 bits: ``values`` bfloat16 and ``positions`` int64, ascending, in the flattened (m, n); both (*batch, count)."""

    values: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Compensated:
    """``quantized`` stands for (*batch, m, n); ``low_rank`` is (left (*batch, m, r), right (*batch, r, n)) or None.

    The term is in bfloat16, or holds the float32 values of ``factors``: (left transposed, right) as they are stored, one scale per
    component. ``branch_input`` says which activation the term is fed: ``quantized``, as the codes are, or ``unquantized``.
    ``outliers`` replace the values of the codes at their positions. ``details`` records, per layer, what a reader of the result should
    know, such as the damping that was needed.
    """

    quantized: QuantizedTensor
    low_rank: tuple[Tensor, Tensor] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    factors: tuple[QuantizedTensor, QuantizedTensor] | None = None
    branch_input: str = "quantized"
    outliers: Outliers | None = None

    def weight(self) -> Tensor:
        """The values of the codes with outliers in their places, float32 (*batch, m, n): all but the low-rank term."""
        weight = self.quantized.dequantize()
        if self.outliers is None:
            return weight
        return weight.flatten(-2).scatter(-1, self.outliers.positions, self.outliers.values.to(weight)).view_as(weight)

    def dequantized(self) -> Tensor:
        """The weight that the model computes with, low-rank term included, float32 (*batch, m, n)."""
        weight = self.weight()
        if self.low_rank is None:
            return weight
        left, right = self.low_rank
        return weight + left.to(weight) @ right.to(weight)
