"""Linears as a packed checkpoint stores them: codes and scales, or a weight in full precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quantizer.tensors import QuantizedTensor
from ..schemes.quant_scheme import QuantScheme
from .code_storage import take_codes
from .compensation_storage import read_low_rank, take_outliers, take_residual


@dataclass(frozen=True)
class PackedLinear:
    """One linear (m, n) of a checkpoint.

    ``quantized`` holds codes (m, n) and parameters, ``weight`` the values in full precision; one of
    them is None. ``outliers`` is (values (count,), rows (count,), columns (count,)) or None.
    ``residual`` is (values (m, r), columns (r,)) or None; the values are added to these columns.
    ``low_rank`` is (left (m, r), right (r, n)) in float32 or None; ``branch_input`` is the activation
    that it multiplies.
    """

    name: str
    quantized: QuantizedTensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    branch_input: str = "quantized"
    outliers: tuple[Tensor, Tensor, Tensor] | None = None
    residual: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        held = self.weight if self.quantized is None else self.quantized.codes
        return tuple(held.shape)  # type: ignore[union-attr, return-value]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values (m, n) in ``dtype`` with outliers and residual columns, without the low-rank term."""
        if self.quantized is None:
            return self.weight.to(dtype)  # type: ignore[union-attr]
        values = self.quantized.dequantize()
        if self.outliers is not None:
            kept, rows, columns = self.outliers
            values[rows, columns] = kept.to(values)
        if self.residual is not None:
            added, columns = self.residual
            values[:, columns] += added.to(values)
        return values.to(dtype)


def take_linear(
    name: str, about: Mapping[str, Any], tensors: dict[str, Tensor], scheme: QuantScheme | None
) -> PackedLinear:
    """Linear ``name`` from the ``tensors`` of a checkpoint with the manifest ``about``; its tensors
    are removed there. Without ``scheme`` it is in full precision."""
    bias = tensors.pop(f"{name}.bias", None)
    if scheme is None:
        return PackedLinear(name, weight=tensors.pop(f"{name}.weight"), bias=bias)
    entry = about["linears"][name]
    low_rank = read_low_rank(name, entry, tensors, torch.float32)
    return PackedLinear(
        name,
        take_codes(name, tuple(entry["shape"]), tensors, scheme),
        bias=bias,
        low_rank=low_rank,
        branch_input=entry["low_rank"]["input"] if low_rank else "quantized",
        outliers=take_outliers(name, entry, tensors),
        residual=take_residual(name, entry, tensors),
    )
