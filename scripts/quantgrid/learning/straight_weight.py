"""Trained weights that are rounded in the forward pass, from the codes of a base."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantizer.quantized_weight import Compensated
from ..quantizer.tensors import QuantizedTensor, fake_quantize, quantize
from .learned_codes import in_cells
from .straight_through import straight_through, substituted


@dataclass(frozen=True)
class StraightWeight:
    """Trained ``weight`` (*batch, m, n) float32 whose rounding is ``base`` at the start.

    Ranges follow the weight, by the rule of the scheme, with the gradient ``gradient``
    (``straight_through.py``). With ``fixed`` they are those of ``base``, and the gradient is that of the
    identity.
    """

    weight: Tensor
    base: QuantizedTensor
    fixed: bool
    gradient: str

    @classmethod
    def of(cls, weight: Tensor, solved: Compensated, base: str, gradient: str) -> StraightWeight:
        """``weight`` with the codes ``solved`` of the mitigation ``base``; ranges are fixed unless that rounds
        to nearest."""
        return cls(in_cells(weight, solved), solved.quantized, base != "rtn", gradient)

    def start(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def rounded(self, values: dict[str, Tensor]) -> Tensor:
        weight, scheme = values["weight"], self.base.scheme
        with torch.no_grad():
            exact = fake_quantize(weight.detach(), scheme, self.base.parameters if self.fixed else None)
        return substituted(weight, exact) if self.fixed else straight_through(weight, exact, scheme, self.gradient)

    def quantized(self, values: dict[str, Tensor]) -> QuantizedTensor:
        return quantize(values["weight"], self.base.scheme, self.base.parameters if self.fixed else None)
