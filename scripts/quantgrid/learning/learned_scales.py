"""Learned scales and zero points of a quantized weight, in their storage formats.

A scale is its initial value times ``factor``; a zero point is its initial value plus (``shift`` -
1/2) times the span of its block. Both are rounded to their storage formats, straight through, a
power of two to the nearest in the logarithm. With units u = W / s and Q the rounding to the element
format the gradients are those of LSQ (arXiv 1902.08153) and LSQ+ (2004.09576) for every format:
dŴ/ds = Q(u) - u where u is in range, the clipping limit elsewhere. With ``fixed_codes`` the codes
do not change, as in EfficientQAT's second phase (arXiv 2407.11062), and dŴ/ds is the value of the
code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..quantizer.ranges import block_ranges
from ..quantizer.scales import QuantizationParameters, block_span, effective_step, load_scale, store_scale
from ..quantizer.tensors import QuantizedTensor, fake_quantize, quantize
from ..schemes.quant_scheme import QuantScheme
from .straight_through import substituted

NO_SHIFT = 0.5
NEAR_EDGE = 0.49  # octaves; at half an octave a power of two rounds to the next


@dataclass(frozen=True)
class ScaledWeight:
    """``weight`` (*batch, m, n) float32 and ``base``, its initial quantization."""

    weight: Tensor
    base: QuantizedTensor
    fixed_codes: bool = False

    @property
    def scheme(self) -> QuantScheme:
        return self.base.scheme

    @property
    def is_shifted(self) -> bool:
        """Check whether the zero point is a value (the minimum of the block) and not a code."""
        return not self.scheme.symmetric and self.scheme.element_format.kind == "float"

    def start(self) -> dict[str, Tensor]:
        """Initial parameters, which reproduce ``base``, in the shape of the scales.

        ``factor`` and, with zero points, ``shift``.
        """
        factor = torch.ones(self.base.scale.shape, device=self.weight.device)
        if self.scheme.storage.kind == "exponent":
            factor = self._within_octave()
        return {"factor": factor} | (
            {} if self.base.zero_point is None else {"shift": torch.full_like(factor, NO_SHIFT)}
        )

    def _within_octave(self) -> Tensor:
        """Unrounded scale of each block relative to its power of two, where it rounds to that
        power.

        A factor of 1 would leave every block half an octave away from a change to another power.
        """
        shape = self.base.scale.shape
        span = block_span(*block_ranges(self.weight.reshape(shape[:-1].numel(), shape[-1], -1), self.scheme)).reshape(
            shape
        )
        step = effective_step(self.base.parameters, self.scheme)
        return torch.where(span > 0, span / self.scheme.limit / step, 1.0).clamp(2**-NEAR_EDGE, 2**NEAR_EDGE)

    def quantized(self, values: dict[str, Tensor]) -> QuantizedTensor:
        """Quantized tensor under these ``factor`` and ``shift``."""
        parameters = self._stored(values)
        if not self.fixed_codes:
            return quantize(self._rounded_weight(values, parameters), self.scheme, parameters)
        return replace(self.base, scale=parameters.scale, zero_point=parameters.zero_point)

    def rounded(self, values: dict[str, Tensor]) -> Tensor:
        """Values of :meth:`quantized`, (*batch, m, n), differentiable with respect to
        ``values``."""
        parameters = self._stored(values)
        with torch.no_grad():
            exact = (
                self.quantized(values).dequantize()
                if self.fixed_codes
                else fake_quantize(self._rounded_weight(values, parameters), self.scheme, parameters)
            )
        step = substituted(self._scale(values) * self._unit(), effective_step(parameters, self.scheme)).unsqueeze(-1)
        zero_point = None
        if parameters.zero_point is not None:
            zero_point = substituted(self._zero_point(values), parameters.zero_point.float()).unsqueeze(-1)
        return substituted(self._smooth(exact, step, zero_point, values), exact)

    def _rounded_weight(self, values: dict[str, Tensor], parameters: QuantizationParameters) -> Tensor:
        """Weight (*batch, m, n) that the codes are rounded from."""
        return self.weight

    def _units(self, step: Tensor, offset: Tensor | float, values: dict[str, Tensor]) -> Tensor:
        """Weight (*batch, m, groups, size) that the codes are rounded from, in units of ``step``."""
        return (self.weight.unflatten(-1, (step.shape[-2], -1)) - offset) / step

    def _smooth(self, exact: Tensor, step: Tensor, zero_point: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """``exact`` as a function of ``step`` and ``zero_point`` (*batch, m or 1, groups, 1) and of
        ``values``, codes fixed."""
        groups = step.shape[-2]
        safe = torch.where(step > 0, step, 1.0)
        offset = zero_point if self.is_shifted else 0.0
        with torch.no_grad():
            units = (exact.unflatten(-1, (groups, -1)) - offset) / safe
        if self.fixed_codes:
            moved = units if zero_point is None or self.is_shifted else units + (zero_point.detach() - zero_point)
        else:
            wanted = self._in_range(self._units(safe, offset, values), zero_point)
            moved = wanted + (units - wanted).detach()
        return (moved * step + offset).flatten(-2)

    def _in_range(self, units: Tensor, zero_point: Tensor | None) -> Tensor:
        """``units`` clipped to the range of the element format.

        The limits of an asymmetric integer move with its zero point.
        """
        element = self.scheme.element_format
        if element.kind == "integer":
            low, high = (
                limit if zero_point is None else limit - zero_point for limit in map(float, self.scheme.code_range)
            )
        elif element.kind == "kmeans":
            low, high = self.base.codebook[..., :1].float(), self.base.codebook[..., -1:].float()
        else:
            low, high = (
                min(element.values()) if element.kind == "codebook" else -element.maximum * element.signed,
                element.maximum,
            )
        units = torch.where(units > high, high, units)
        return torch.where(units < low, low, units)

    def _unit(self) -> Tensor:
        """Value of one unit of the stored scale: global scale times the constant of the scale
        rule."""
        unit = torch.tensor(self.scheme.scale_multiplier, device=self.weight.device)
        return unit if self.base.global_scale is None else unit * self.base.global_scale

    def _scale(self, values: dict[str, Tensor]) -> Tensor:
        return load_scale(self.base.scale, self.scheme.storage) * values["factor"]

    def _zero_point(self, values: dict[str, Tensor]) -> Tensor:
        low, high = self.scheme.code_range
        span = effective_step(self.base.parameters, self.scheme) * self.scheme.limit if self.is_shifted else high - low
        return self.base.zero_point.float() + (values["shift"] - NO_SHIFT) * span

    @torch.no_grad()
    def _stored(self, values: dict[str, Tensor]) -> QuantizationParameters:
        """Scales and zero points rounded to storage formats; powers of two to the nearest
        logarithm."""
        storage, scale, zero_point = self.scheme.storage, self._scale(values), None
        if storage.kind == "exponent":
            stored = (scale.log2().round() + storage.bias).clamp(0, 2 * storage.bias).to(torch.uint8)
        else:
            stored = store_scale(scale, storage)
        if self.base.zero_point is not None:
            zero_point = self._zero_point(values)
            zero_point = (
                zero_point if self.is_shifted else zero_point.round().clamp(*self.scheme.code_range).to(torch.uint8)
            )
        return QuantizationParameters(stored, zero_point, self.base.global_scale, self.base.codebook)
