"""Learned rounding of a quantized weight: an offset before rounding, and a factor of each range.

The codes are those of W / s + V d, with d the distance of the two codes around W / s: V counts in
code distances for every element format. For integers this is SignRound (arXiv 2309.05516); on float
elements its published code counts V in units of s instead. Codes follow their scale, which is its
initial value times a factor; the published code has a factor for each end of a range, here it is one
for the scale and a shift of the zero point. A scale that is a power of two has no factor, which could
only halve it: its exponent is that of ``base``. Gradients pass rounding straight through: dŴ/dV = s d
where W / s + V d is in range, 0 elsewhere. Further deviations from AutoRound 0.16: there a symmetric
integer has the largest weight, with its sign, over -8 as its scale, here the scale of its scheme; the
derivative of an integer ends where its rounded value leaves the range; a factor multiplies the scale
before its first rounding to storage, here the rounded one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantizer.quantized_weight import Compensated
from ..quantizer.rounding import code_distance
from ..quantizer.scales import QuantizationParameters, effective_step
from ..quantizer.tensors import QuantizedTensor, fake_quantize
from .learned_scales import ScaledWeight
from .trainables import Bounds

INSIDE = 0.25  # of a code distance: halfway to the edge of a cell, where one step of training leaves no cell
NUDGE = 1e-3  # of a code distance


@dataclass(frozen=True)
class RoundedWeight(ScaledWeight):
    """``weight`` (*batch, m, n) float32 that rounds to the codes of ``base``, with learned ``ranges`` or
    with the scales of ``base``."""

    ranges: bool = True

    def start(self) -> dict[str, Tensor]:
        """Initial parameters, which reproduce ``base``: ``offset`` (*batch, m, n) of 0 and, with
        ``ranges``, those of :class:`ScaledWeight`, without ``factor`` for powers of two."""
        return {"offset": torch.zeros_like(self.weight)} | self._trained_ranges()

    def bounds(self) -> dict[str, Bounds]:
        """Smallest and largest value of the parameters that have one: a range only shrinks."""
        return dict.fromkeys(self._trained_ranges(), (0.0, 1.0))

    def quantized(self, values: dict[str, Tensor]) -> QuantizedTensor:
        return super().quantized(super().start() | values)

    def rounded(self, values: dict[str, Tensor]) -> Tensor:
        return super().rounded(super().start() | values)

    def _trained_ranges(self) -> dict[str, Tensor]:
        exponents = self.scheme.storage.kind == "exponent"
        begun = super().start() if self.ranges else {}
        return {name: value for name, value in begun.items() if not (exponents and name == "factor")}

    def _rounded_weight(self, values: dict[str, Tensor], parameters: QuantizationParameters) -> Tensor:
        step = effective_step(parameters, self.scheme).unsqueeze(-1)
        safe = torch.where(step > 0, step, 1.0)
        offset = 0.0
        if self.is_shifted:
            offset = parameters.zero_point.unsqueeze(-1)
        moved = self._move(safe, offset, values) * step
        # -0 + 0 is 0, which is another code of a float
        return torch.where(values["offset"] == 0, self.weight, self.weight + moved.flatten(-2))

    def _units(self, step: Tensor, offset: Tensor | float, values: dict[str, Tensor]) -> Tensor:
        return super()._units(step, offset, values) + self._move(step, offset, values)

    def _move(self, step: Tensor, offset: Tensor | float, values: dict[str, Tensor]) -> Tensor:
        """V d (*batch, m, groups, size)."""
        with torch.no_grad():
            distance = code_distance(super()._units(step, offset, values), self.scheme, self._entries())
        return values["offset"].unflatten(-1, (step.shape[-2], -1)) * distance

    def _entries(self) -> Tensor | None:
        """Codebook of every block, (*batch, m, groups, entries)."""
        book = self.base.codebook
        return None if book is None else book.expand(*self.weight.shape[:-1], *book.shape[-2:])


def in_cells(weight: Tensor, solved: Compensated) -> Tensor:
    """``weight`` (*batch, m, n) float32, moved so that rounding to nearest gives the values of ``solved``.

    A weight that rounds to its value stays; another one moves to ``INSIDE`` of a code distance from it. At
    the edge of the cell the first small step would round all of them back.
    """
    base = solved.quantized
    exact = base.dequantize(torch.float32)
    there = fake_quantize(weight, base.scheme, base.parameters) == exact
    if bool(there.all()):
        return weight
    step = effective_step(base.parameters, base.scheme).unsqueeze(-1)
    scaled = RoundedWeight(weight, base)
    shift = base.zero_point.unsqueeze(-1) if scaled.is_shifted else 0.0
    groups, book = step.shape[-2], scaled._entries()
    safe = torch.where(step > 0, step, 1.0)
    code = (exact.unflatten(-1, (groups, -1)) - shift) / safe
    small = NUDGE * code_distance(code, base.scheme, book)
    above, below = (INSIDE * code_distance(code + sign * small, base.scheme, book) for sign in (1, -1))
    gap = (weight.unflatten(-1, (groups, -1)) - shift) / safe - code
    moved = (code + torch.minimum(torch.maximum(gap, -below), above)) * step + shift
    return torch.where(there, weight, moved.flatten(-2))
