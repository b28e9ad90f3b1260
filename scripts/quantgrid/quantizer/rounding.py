"""Elementwise rounding: values -> codes -> values under a given step, with broadcasting.

A *step* is the size of one unit of the element format (scale x global scale); where it is 0 the
element is zero. The zero point of an integer is a code, x = step * (code - zero point); that of an
unsigned float is a value, x = step * unit + zero point. Ties go to the even code (IEEE 754
round-half-to-even), in a codebook to the lower one; values beyond the format saturate. Arithmetic
is float32, or float64 for float64 values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..ground.errors import ConfigError
from ..schemes.number_formats import NumberFormat
from ..schemes.quant_scheme import QuantScheme

# Per arithmetic dtype: the integer of its width, its exponent field, its mantissa bits and its
# exponent bias.
_LAYOUT = {
    torch.float32: (torch.int32, 0x7F800000, 23, 127),
    torch.float64: (torch.int64, 0x7FF0000000000000, 52, 1023),
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic dtype for values of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def code_values(number_format: NumberFormat, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Value of every code as a cached 1-D tensor; do not modify it."""
    return torch.tensor(number_format.values(), dtype=dtype).to(device)


def encode(
    x: Tensor, step: Tensor, zero_point: Tensor | None, scheme: QuantScheme, codebook: Tensor | None = None
) -> Tensor:
    """Codes of ``x``: int8 for symmetric integers, uint8 for all other elements.

    Asymmetric integers: code = round(x/step) + zero_point. Floats and codebooks: bit pattern and
    position. ``step`` and ``zero_point`` (None: symmetric) broadcast against ``x``. ``codebook``
    (k-means elements) holds in its last dimension the entries of each block of the last dimension.
    """
    units = _units(x, step, zero_point, scheme)
    element = scheme.element_format
    if element.kind in ("codebook", "kmeans"):
        return _nearest_entry(units, element, codebook).to(torch.uint8)
    units = round_units_(units, zero_point, scheme)
    if element.kind == "float":
        return float_code(units, element)
    return units.to(torch.int8) if zero_point is None else (units + zero_point).to(torch.uint8)


def decode(codes: Tensor, step: Tensor, zero_point: Tensor | None, scheme: QuantScheme,
           dtype: torch.dtype = torch.float32, codebook: Tensor | None = None) -> Tensor:  # fmt: skip
    """Values of the codes of ``encode``, computed in float32 (float64 for a float64 ``dtype``).

    The result is rounded to ``dtype``.
    """
    compute = compute_dtype(dtype)
    element = scheme.element_format
    if element.kind == "integer":
        units = codes.to(compute) if zero_point is None else codes.to(compute) - zero_point
    elif element.kind == "kmeans":
        units = codebook.to(compute).gather(-1, codes.long())  # type: ignore[union-attr]
    else:
        units = _looked_up(code_values(element, compute, codes.device), codes)
    return _values_(units, step.to(compute), zero_point, scheme).to(dtype)


def round_values(
    x: Tensor, step: Tensor, zero_point: Tensor | None, scheme: QuantScheme, codebook: Tensor | None = None
) -> Tensor:
    """``decode(encode(x))`` in the dtype of ``x``, bit-identical, without materializing codes."""
    units = round_units_(_units(x, step, zero_point, scheme), zero_point, scheme, codebook)
    return _values_(units, step.to(units.dtype), zero_point, scheme).to(x.dtype)


def round_values_(
    x: Tensor, step: Tensor, zero_point: Tensor | None, scheme: QuantScheme, codebook: Tensor | None = None
) -> Tensor:
    """``round_values`` in place, for float32 or float64 ``x``, in fewer passes.

    Steps with more dimensions than ``x`` leave it unchanged (symmetric schemes only). On a GPU it synchronizes once.
    """
    zero, step = step == 0, step.to(x.dtype)
    if _is_shifted(scheme):
        x.sub_(zero_point)  # type: ignore[arg-type]
    steps = step.masked_fill(zero, math.inf)
    x = x / steps if steps.dim() > x.dim() else x.div_(steps)
    if scheme.element_format.kind != "integer" and bool(zero.any()):
        x.masked_fill_(zero, 0.0)  # x/inf keeps the sign of x; integers lose it anyway
    return _values_(round_units_(x, zero_point, scheme, codebook), step, zero_point, scheme)


def _is_shifted(scheme: QuantScheme) -> bool:
    """Check whether the zero point is a value (the minimum of the block) and not a code."""
    return not scheme.symmetric and scheme.element_format.kind == "float"


def _units(x: Tensor, step: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """``x`` in units of the element format, in the arithmetic dtype; +0 where the step is 0."""
    step = step.to(compute_dtype(x.dtype))
    x = x - zero_point.to(step.dtype) if _is_shifted(scheme) else x  # type: ignore[union-attr]
    return (x / step).masked_fill_(step <= 0, 0.0)


def _values_(units: Tensor, step: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """Values of ``units`` (overwritten)."""
    values = units.mul_(step)
    return values.add_(zero_point) if _is_shifted(scheme) else values  # type: ignore[arg-type]


def round_units_(
    units: Tensor, zero_point: Tensor | None, scheme: QuantScheme, codebook: Tensor | None = None
) -> Tensor:
    """Round ``units`` (float32 or float64, in place) to the element format.

    Integers are limited to the codes representable with their zero point.
    """
    element = scheme.element_format
    if element.kind == "float":
        return round_to_float_(units, element)
    if element.kind == "codebook":
        return _looked_up(code_values(element, units.dtype, units.device), _nearest_entry(units, element, None))
    if element.kind == "kmeans":
        position = _nearest_entry(units, element, codebook)
        return codebook.to(units.dtype).gather(-1, position.long())  # type: ignore[union-attr]
    low, high = scheme.code_range
    if zero_point is None:
        # integers have a single zero: -0 + 0 = +0
        return units.round_().clamp_(low, high).add_(0.0)
    return units.round_().add_(zero_point).clamp_(low, high).sub_(zero_point)


def round_to_float_(x: Tensor, number_format: NumberFormat) -> Tensor:
    """Round ``x`` (float32 or float64, in place) to a float format, with subnormals and signed
    zeros.

    Adding and subtracting 1.5 * 2**(p - m) * 2**floor(log2 |x|), p the mantissa bits of the
    arithmetic and m those of the format, leaves m bits of mantissa; the addition itself rounds half
    to even.
    """
    integer, exponent_field, precision, _ = _LAYOUT[x.dtype]
    x.clamp_(-number_format.maximum if number_format.signed else 0.0, number_format.maximum)
    power = torch.bitwise_and(x.view(integer), exponent_field).view(x.dtype).clamp_(min=number_format.minimum_normal)
    magic = 1.5 * 2 ** (precision - number_format.mantissa_bits)
    rounded = torch.add(x, power, alpha=magic).sub_(power, alpha=magic)
    return rounded.copysign_(x) if number_format.signed else rounded


def float_code(values: Tensor, number_format: NumberFormat) -> Tensor:
    """Bit patterns (uint8) of ``values``, each a finite value of the float format."""
    integer, _, precision, bias = _LAYOUT[values.dtype]
    mantissa_bits, magnitude = number_format.mantissa_bits, values.abs()
    normal = (magnitude.view(integer) >> (precision - mantissa_bits)) - ((bias - number_format.bias) << mantissa_bits)
    subnormal = (magnitude / number_format.minimum_positive).to(integer)
    code = torch.where(magnitude < number_format.minimum_normal, subnormal, normal)
    if number_format.signed:
        code += torch.signbit(values).to(integer) << (number_format.bits - 1)
    return code.to(torch.uint8)


def code_distance(units: Tensor, scheme: QuantScheme, codebook: Tensor | None = None) -> Tensor:
    """Distance of the two values of the element format around each of ``units``, in the same units.

    At a value it is the distance to one of its neighbours. ``codebook``: see ``encode``.
    """
    element = scheme.element_format
    if element.kind == "integer":
        return torch.ones_like(units)
    if element.kind == "float":
        integer, exponent_field, *_ = _LAYOUT[units.dtype]
        magnitude = units.abs().clamp_(max=element.maximum)
        power = torch.bitwise_and(magnitude.view(integer), exponent_field).view(units.dtype)
        return power.clamp_(min=element.minimum_normal).mul_(2.0**-element.mantissa_bits)
    entries = code_values(element, units.dtype, units.device) if codebook is None else codebook.to(units.dtype)
    above = torch.searchsorted(entries.contiguous(), units.contiguous(), right=True)
    above = above.clamp_(1, entries.shape[-1] - 1)
    if codebook is None:
        return entries[above] - entries[above - 1]
    return entries.gather(-1, above) - entries.gather(-1, above - 1)


def _nearest_entry(units: Tensor, number_format: NumberFormat, codebook: Tensor | None) -> Tensor:
    """Position (int32) of the codebook entry nearest to each of ``units``; ties go to the lower
    one."""
    if number_format.kind == "kmeans":
        if codebook is None:
            raise ConfigError(
                f"element '{number_format.name}' needs a codebook: pass the codebook of the tensor's parameters"
            )
        entries = codebook.to(units.dtype)
        return torch.searchsorted(
            ((entries[..., 1:] + entries[..., :-1]) / 2).contiguous(), units.contiguous(), out_int32=True
        )
    bins = _bins(number_format, units.dtype, units.device)
    places = bins.places(units)
    return _looked_up(bins.below, places).add_(units > _looked_up(bins.midpoint, places))


@dataclass(frozen=True)
class _Bins:
    """Equal intervals with at most one midpoint of a codebook each: a search without branches.

    ``below`` counts the midpoints in smaller intervals, ``midpoint`` is the one inside, or infinity.
    """

    first: float
    per_unit: float
    below: Tensor
    midpoint: Tensor

    def places(self, units: Tensor) -> Tensor:
        """Interval (int32) of each of ``units``, which never falls as they rise; NaN is in the first."""
        last = len(self.below) - 1
        return ((units - self.first) * self.per_unit).clamp_(0, last).to(torch.int32).clamp_(0, last)


@cache
def _bins(number_format: NumberFormat, dtype: torch.dtype, device: torch.device) -> _Bins:
    values = torch.tensor(number_format.values(), dtype=torch.float64)
    midpoints = ((values[1:] + values[:-1]) / 2).to(dtype)
    first, width = float(midpoints[0]), float(midpoints[-1] - midpoints[0])
    count = 1024
    while True:
        empty = _Bins(first, (count - 1) / width, torch.zeros(count, dtype=torch.int32), torch.empty(0))
        places = empty.places(midpoints)
        if len(places.unique()) == len(midpoints):
            break
        count *= 2
    below = (places.unsqueeze(0) < torch.arange(count).unsqueeze(1)).sum(1, dtype=torch.int32)
    midpoint = torch.full((count,), math.inf, dtype=dtype)
    midpoint[places] = midpoints
    return _Bins(first, empty.per_unit, below.to(device), midpoint.to(device))


def _looked_up(table: Tensor, places: Tensor) -> Tensor:
    """Entries of the vector ``table`` at integer ``places``, faster than by indexing."""
    return table.index_select(0, places.flatten().to(torch.int32)).view_as(places)
