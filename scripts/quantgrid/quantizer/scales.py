"""Scales and zero points of scale blocks: range of a block -> stored parameters -> step.

Integers as in arXiv 2106.08295; E8M0 rules of OCP MX v1.0, torchao, NVIDIA and FP-Quant; two-level
scales of NVFP4 (docs/reference/formats.md). All shapes broadcast. Arithmetic is float32 for every tensor
dtype, so that a stored scale has one meaning.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schemes.number_formats import SCALE_FORMATS, ScaleFormat
from ..schemes.quant_scheme import QuantScheme
from .rounding import code_values, float_code, round_to_float_

STORAGE_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
# integer dtype of a stored scale, by its bytes
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_MANTISSA = 0x7FFFFF


@dataclass(frozen=True)
class QuantizationParameters:
    """Parameters of a quantized tensor other than the codes, as stored.

    scale         (*batch, rows, groups), rows or groups 1 if one scale serves all; dtype of
                  the scale format, uint8 codes for formats that torch lacks (e8m0: the byte
                  e + 127)
    zero_point    shape of ``scale``: uint8 codes for integers; for unsigned floats the
                  minimum of the block, float32 whatever the scale format (e8m0 has no zero,
                  an e4m3 minimum would shift a block by up to 1/16 of itself, and it can
                  exceed the largest scale); None for symmetric schemes
    global_scale  float32, broadcasts against ``scale``; None where the scheme has none
    codebook      float16 (*batch, rows, groups, 2**bits), ascending, in units of the step;
                  None except for k-means elements
    """

    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None
    codebook: Tensor | None = None

    def __getitem__(self, blocks: Tensor) -> QuantizationParameters:
        """Parameters of some ``blocks`` (numbers) of those of single blocks (blocks,), without codebooks."""
        parts = (None if part is None else part[blocks] for part in (self.zero_point, self.global_scale))
        return QuantizationParameters(_bits(self.scale)[blocks].view(self.scale.dtype), *parts)

    def replaced(self, blocks: Tensor, other: QuantizationParameters) -> QuantizationParameters:
        """Parameters with the scales and zero points of ``blocks`` (numbers) from ``other``."""
        scale = _bits(self.scale).index_copy(0, blocks, _bits(other.scale)).view(self.scale.dtype)
        if self.zero_point is None or other.zero_point is None:
            return QuantizationParameters(scale, self.zero_point, self.global_scale)
        return QuantizationParameters(scale, self.zero_point.index_copy(0, blocks, other.zero_point), self.global_scale)

    def view(self, shape: torch.Size) -> QuantizationParameters:
        """Parameters of single blocks in the ``shape`` of their tensor."""
        parts = (None if part is None else part.view(shape) for part in (self.zero_point, self.global_scale))
        return QuantizationParameters(self.scale.view(shape), *parts)


def _bits(scale: Tensor) -> Tensor:
    """Stored scales as integers: float8 has no indexed assignment everywhere."""
    return scale.view(_BITS[scale.element_size()])


def store_scale(values: Tensor, storage: ScaleFormat) -> Tensor:
    """Round float32 ``values`` >= 0 to the scale format, in its storage dtype.

    Half to even, saturating.
    """
    if storage.name in STORAGE_DTYPES:
        return values.clamp(max=storage.maximum).to(STORAGE_DTYPES[storage.name])
    if storage.kind == "integer":
        return values.clamp(max=storage.maximum).round_().to(torch.uint8)
    return float_code(round_to_float_(values.clone(), storage), storage)


def store_scale_up(values: Tensor, storage: ScaleFormat) -> Tensor:
    """Round float32 ``values`` >= 0 up to the scale format (saturating), in its storage dtype."""
    stored = store_scale(values, storage)
    short = load_scale(stored, storage) < values.clamp(max=storage.maximum)
    # bit patterns ascend with the value
    return (_bits(stored) + short).view(stored.dtype)


def load_scale(stored: Tensor, storage: ScaleFormat) -> Tensor:
    """Float32 values of the output of ``store_scale``."""
    if storage.name in STORAGE_DTYPES:
        return stored.float()
    # the byte is float32's exponent, except for the subnormal 2**-127 and for NaN
    if storage.kind == "exponent":
        special = (stored == 0) | (stored == 2**storage.bits - 1)
        return (stored.to(torch.int32) << 23 | special.to(torch.int32) << 22).view(torch.float32)
    return code_values(storage, torch.float32, stored.device)[stored.to(torch.int32)]


def block_span(low: Tensor | None, high: Tensor) -> Tensor:
    """Span covered by ``scheme.limit`` steps: ``high``, or high - low of an asymmetric range."""
    return high if low is None else high - low


def range_parameters(low: Tensor | None, high: Tensor, scheme: QuantScheme, global_scale: Tensor | None,
                     covering: bool = False) -> QuantizationParameters:  # fmt: skip
    """Parameters of blocks with float32 ranges [``low``, ``high``] containing 0.

    ``low`` None means [-high, high]. A stored scale may be too small for its range, by the scale
    rule or by rounding to nearest; ``covering`` selects the smallest scale that covers the range.
    """
    span = block_span(low, high)
    if scheme.scale_format == "e8m0":
        scale = _power_of_two(span, scheme, covering)
    else:
        scale = span / scheme.limit
        if global_scale is not None:
            scale = torch.where(global_scale > 0, scale / global_scale, 0.0)
        scale = (store_scale_up if covering else store_scale)(scale, scheme.storage)
    parameters = QuantizationParameters(scale, None, global_scale)
    if low is None:
        return parameters
    step = effective_step(parameters, scheme)
    if scheme.element_format.kind == "float":
        return QuantizationParameters(scale, torch.where(step > 0, low, 0.0), global_scale)
    zero_point = torch.where(step > 0, (-low / step).round_(), 0.0).clamp_(*scheme.code_range)
    return QuantizationParameters(scale, zero_point.to(torch.uint8), global_scale)


def choose(mask: Tensor, one: QuantizationParameters, other: QuantizationParameters) -> QuantizationParameters:
    """Select ``one`` where ``mask`` (the shape of their scales) is set, else ``other``.

    Both have the same global scale and no codebook.
    """
    scale = torch.where(mask, _bits(one.scale), _bits(other.scale)).view(one.scale.dtype)
    zero_point = None if one.zero_point is None else torch.where(mask, one.zero_point, other.zero_point)  # type: ignore[arg-type]
    return QuantizationParameters(scale, zero_point, one.global_scale)


def effective_step(parameters: QuantizationParameters, scheme: QuantScheme) -> Tensor:
    """Float32 size of one element unit per scale: scale x global scale x the constant of the scale
    rule."""
    step = load_scale(parameters.scale, scheme.storage)
    if parameters.global_scale is not None:
        step = step * parameters.global_scale
    return step if scheme.scale_multiplier == 1 else step * scheme.scale_multiplier


def _power_of_two(span: Tensor, scheme: QuantScheme, covering: bool) -> Tensor:
    """E8M0 byte of each block of ``span``: exponent of the span minus exponent of the limit.

    The scheme's rule rounds it (``covering``: rceil). Every rule adds a constant to the float32
    bits of ``span``; the carry increments the exponent. ``even`` does so where rounding to the
    element's mantissa would, ``rceil`` where the mantissa exceeds that of the limit, so that
    nothing saturates. ``four_thirds`` is ``floor`` plus two exponents, which the multiplier of 1/3
    compensates: nothing saturates. A zero block gets the byte 0.
    """
    (limit_bits,) = struct.unpack("i", struct.pack("f", scheme.limit))
    element, signed, rule = scheme.element_format, scheme.symmetric, scheme.scale_rule
    rule = "rceil" if covering and rule != "four_thirds" else rule
    mantissa_bits = element.bits - 1 - signed if element.kind == "integer" else element.mantissa_bits
    carry = {
        "floor": 0,
        "four_thirds": 0,
        "even": 1 << (22 - mantissa_bits),
        "rceil": _MANTISSA - (limit_bits & _MANTISSA),
    }[rule]
    exponent = (span.contiguous().view(torch.int32) + carry) >> 23
    exponent -= (limit_bits >> 23) - 127 - 2 * (rule == "four_thirds")
    return exponent.clamp_(0, 2 * SCALE_FORMATS["e8m0"].bias).masked_fill_(span == 0, 0).to(torch.uint8)
