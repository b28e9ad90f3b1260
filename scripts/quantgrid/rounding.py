"""Rounding of elements: values -> codes -> values, elementwise and with broadcasting, under a given step.

A *step* is the size that one unit of the element format stands for (scale x global scale); where it is 0 the element is zero.
Ties go to the even code (IEEE 754 round-half-to-even), to the lower one in a codebook; what exceeds the format saturates.
Arithmetic is float32, or float64 for float64 values. No synchronisation with a device happens here.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .formats import NumberFormat
from .schemes import QuantScheme

# Per arithmetic dtype: the integer of its width, its exponent field, its mantissa bits and its exponent bias.
_LAYOUT = {torch.float32: (torch.int32, 0x7F800000, 23, 127), torch.float64: (torch.int64, 0x7FF0000000000000, 52, 1023)}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of ``dtype`` are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def code_values(number_format: NumberFormat, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The value of every code as a 1-D tensor; shared, not to be written to."""
    return torch.tensor(number_format.values(), dtype=dtype, device=device)


def encode(x: Tensor, step: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """Codes of ``x``: int8 for symmetric integers, uint8 for asymmetric ones (code = round(x/step) + zero_point) and for floats and
    codebooks (the bit pattern, the position). ``step`` and ``zero_point`` (None: symmetric) broadcast against ``x``."""
    units = _units(x, step)
    element = scheme.element_format
    if element.kind == "codebook":
        return _nearest_entry(units, element).to(torch.uint8)
    units = round_units_(units, zero_point, scheme)
    if element.kind == "float":
        return float_code(units, element)
    return units.to(torch.int8) if zero_point is None else (units + zero_point).to(torch.uint8)


def decode(codes: Tensor, step: Tensor, zero_point: Tensor | None, scheme: QuantScheme, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of ``encode``'s codes; computed in float32 (float64 for a float64 ``dtype``), then rounded to ``dtype``."""
    compute = compute_dtype(dtype)
    if scheme.element_format.kind == "integer":
        units = codes.to(compute) if zero_point is None else codes.to(compute) - zero_point
    else:
        units = code_values(scheme.element_format, compute, codes.device)[codes.to(torch.int32)]
    return (units * step.to(compute)).to(dtype)


def round_values(x: Tensor, step: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """``decode(encode(x))`` in the dtype of ``x``, bit for bit, without making codes."""
    units = round_units_(_units(x, step), zero_point, scheme)
    return (units * step.to(units.dtype)).to(x.dtype)


def _units(x: Tensor, step: Tensor) -> Tensor:
    """x/step in the arithmetic dtype, +0 where the step is 0."""
    step = step.to(compute_dtype(x.dtype))
    return torch.where(step > 0, x / step, 0.0)


def round_units_(units: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """``units`` = x/step (float32 or float64, overwritten) rounded to what the element format and the zero point can hold."""
    element = scheme.element_format
    if element.kind == "float":
        return round_to_float_(units, element)
    if element.kind == "codebook":
        return code_values(element, units.dtype, units.device)[_nearest_entry(units, element)]
    low, high = scheme.code_range
    if zero_point is None:
        return units.round_().clamp_(low, high).add_(0.0)  # integers have one zero: -0 + 0 = +0
    return units.round_().add_(zero_point).clamp_(low, high).sub_(zero_point)


def round_to_float_(x: Tensor, number_format: NumberFormat) -> Tensor:
    """``x`` (float32 or float64, overwritten) rounded to the values of a float format, subnormals and the sign of zero included.

    Adding and subtracting 1.5 * 2**(p - m) * 2**floor(log2 |x|), p the mantissa bits of the arithmetic and m those of the format,
    leaves m bits of mantissa, rounded half to even by the adder itself.
    """
    integer, exponent_field, precision, _ = _LAYOUT[x.dtype]
    x.clamp_(-number_format.maximum, number_format.maximum)
    magic = torch.bitwise_and(x.view(integer), exponent_field).view(x.dtype)
    magic.clamp_(min=number_format.minimum_normal).mul_(1.5 * 2 ** (precision - number_format.mantissa_bits))
    rounded = x + magic
    return rounded.sub_(magic).copysign_(x)


def float_code(values: Tensor, number_format: NumberFormat) -> Tensor:
    """The bit pattern (uint8) of ``values``, each of them a finite value of the float format."""
    integer, _, precision, bias = _LAYOUT[values.dtype]
    mantissa_bits, magnitude = number_format.mantissa_bits, values.abs()
    normal = (magnitude.view(integer) >> (precision - mantissa_bits)) - ((bias - number_format.bias) << mantissa_bits)
    subnormal = (magnitude / number_format.minimum_positive).to(integer)
    code = torch.where(magnitude < number_format.minimum_normal, subnormal, normal)
    return (code + (torch.signbit(values).to(integer) << (number_format.bits - 1))).to(torch.uint8)


def _nearest_entry(units: Tensor, number_format: NumberFormat) -> Tensor:
    """Position (int32) of the codebook's entry nearest to each of ``units``, of two the lower one."""
    return torch.bucketize(units.contiguous(), _midpoints(number_format, units.dtype, units.device), out_int32=True)


@cache
def _midpoints(number_format: NumberFormat, dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.tensor(number_format.values(), dtype=torch.float64)
    return ((values[1:] + values[:-1]) / 2).to(device, dtype)
