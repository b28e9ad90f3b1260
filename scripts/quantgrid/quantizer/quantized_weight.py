"""Result of a mitigation: quantized weight, optional low-rank term, outliers and residual columns,
diagnostics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tensors import QuantizedTensor


@dataclass(frozen=True)
class Outliers:
    """Weights kept in 16 bits: bfloat16 ``values`` at int64 ``positions``, both (*batch, count).

    Positions index the flattened (m, n), ascending.
    """

    values: Tensor
    positions: Tensor


@dataclass(frozen=True)
class ResidualColumns:
    """Second codes of some columns, added to the int64 ``columns`` (*batch, r).

    ``parts`` (*batch, m, ·) side by side: the columns in whole scale groups, and those left by the group
    size, which are one shorter group. One of them may be missing.
    """

    parts: tuple[QuantizedTensor, ...]
    columns: Tensor

    def added_to(self, weight: Tensor) -> Tensor:
        """``weight`` (*batch, m, n) with the second codes added."""
        values = torch.cat([part.dequantize() for part in self.parts], -1).to(weight)
        return weight.scatter_add(-1, self.columns.unsqueeze(-2).expand_as(values), values)


@dataclass(frozen=True)
class Compensated:
    """Quantized weight (*batch, m, n) with an optional low-rank term, outliers and residual columns.

    ``low_rank`` is (left (*batch, m, r), right (*batch, r, n)) or None: in bfloat16, or the float32
    values of ``factors``, which are (left transposed, right) as stored, with one scale per
    component. ``branch_input`` selects the activation that the term multiplies: ``quantized``, as
    for the codes, or ``unquantized``. ``outliers`` replace the decoded values at their positions,
    ``residual`` is added to its columns.
    ``details`` records diagnostics per layer, such as the damping that was needed.
    """

    quantized: QuantizedTensor
    low_rank: tuple[Tensor, Tensor] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    factors: tuple[QuantizedTensor, QuantizedTensor] | None = None
    branch_input: str = "quantized"
    outliers: Outliers | None = None
    residual: ResidualColumns | None = None

    def weight(self) -> Tensor:
        """Decoded values with outliers and residual columns, float32 (*batch, m, n), without the low-rank
        term."""
        weight = self.quantized.dequantize()
        if self.outliers is not None:
            kept = self.outliers
            weight = weight.flatten(-2).scatter(-1, kept.positions, kept.values.to(weight)).view_as(weight)
        return weight if self.residual is None else self.residual.added_to(weight)

    def dequantized(self) -> Tensor:
        """Effective weight with outliers, residual columns and low-rank term, float32 (*batch, m, n)."""
        weight = self.weight()
        if self.low_rank is None:
            return weight
        left, right = self.low_rank
        return weight + left.to(weight) @ right.to(weight)
