"""Quantization of tensors under a ``QuantScheme``: codes and scales as they are stored, or the rounded values alone.

Tensors are (*batch, rows, n): scale blocks run along the last dimension, every (rows, n) matrix of the batch is a tensor of its own.
One dimension is one row. Definitions: methods.md sections 2-4. Nothing here carries gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, NumericalFailure
from .ranges import block_ranges, row_slices, search_ranges
from .rounding import compute_dtype, decode, encode, round_units_, round_values
from .scales import QuantizationParameters, block_span, effective_step, range_parameters
from .schemes import PRESETS, QuantScheme, activation_scheme, scheme

__all__ = ["PRESETS", "QuantScheme", "QuantizationParameters", "QuantizedTensor", "activation_scheme", "decode", "encode", "fake_quantize",
           "find_parameters", "quantize", "round_values", "scheme", "step_size", "zero_points"]  # fmt: skip

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized tensor as it is stored: ``codes`` in the shape of the original, the parameters as in ``QuantizationParameters``."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None
    scheme: QuantScheme
    dtype: torch.dtype

    @property
    def parameters(self) -> QuantizationParameters:
        return QuantizationParameters(self.scale, self.zero_point, self.global_scale)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Values in the shape of ``codes`` and in ``dtype`` (default: that of the tensor that was quantized)."""
        dtype = self.dtype if dtype is None else dtype
        result = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        if self.codes.numel():
            codes, step, zero_point = _by_rows(self.codes, self.parameters, self.scheme)
            values = result.view(codes.shape)
            for rows in row_slices(codes):
                values[rows] = decode(codes[rows], step[rows], None if zero_point is None else zero_point[rows], self.scheme, dtype)
        return result

    def bits(self) -> float:
        """Average stored bits per element: codes, scales, zero points and global scales."""
        if not self.codes.numel():
            return 0.0
        element = self.scheme.element_format.bits
        bits = self.codes.numel() * element + self.scale.numel() * self.scheme.storage.bits
        bits += 0 if self.zero_point is None else self.zero_point.numel() * element
        bits += 0 if self.global_scale is None else self.global_scale.numel() * 32
        return bits / self.codes.numel()


def find_parameters(x: Tensor, scheme: QuantScheme, global_scale: Tensor | float | None = None) -> QuantizationParameters:
    """Scales, zero points and global scales of ``x`` (*batch, rows, n), in their storage formats and shapes.

    Args:
        x: float16, bfloat16, float32 or float64.
        scheme: the scheme; the group size has to divide n.
        global_scale: taken instead of one found from ``x`` (several linears may share one); ``static`` schemes need it. A number,
            or a tensor that broadcasts to (*batch, rows or 1, 1).

    Raises:
        ConfigError: for a shape, dtype or global scale that the scheme does not take.
        NumericalFailure: if a range is not finite (NaN or infinity in ``x``, or beyond float32).
    """
    _check_dtype(x)
    shape = scheme.scale_shape(x.shape)
    values = _scale_blocks(x.detach(), scheme, shape)
    low, high = block_ranges(values, scheme)
    if not bool(torch.isfinite(block_span(low, high)).all()):
        raise NumericalFailure(_not_finite(x))
    low, high = (None if end is None else end.reshape(shape) for end in (low, high))
    global_scale = _global_scale(block_span(low, high), scheme, x.shape, global_scale)
    if scheme.range == "mse" and x.numel():
        low, high = _search(values, low, high, scheme, global_scale)
    return range_parameters(low, high, scheme, global_scale)


def quantize(x: Tensor, scheme: QuantScheme, parameters: QuantizationParameters | None = None) -> QuantizedTensor:
    """``x`` (*batch, rows, n) rounded to codes under ``parameters`` (default: found from ``x``).

    Symmetric integer codes are int8, asymmetric ones uint8, those of floats and codebooks uint8 bit patterns.
    Raises as ``find_parameters`` does, also for NaN or infinity in ``x`` under given parameters.
    """
    if parameters is None:
        parameters = find_parameters(x, scheme)
    else:
        _check_dtype(x)
        _check_finite(x)
    signed = scheme.code_range[0] < 0
    codes = torch.empty(x.shape, dtype=torch.int8 if signed else torch.uint8, device=x.device)
    if x.numel():
        values, step, zero_point = _by_rows(x.detach(), parameters, scheme)
        codes_by_rows = codes.view(values.shape)
        for rows in row_slices(values):
            codes_by_rows[rows] = encode(values[rows], step[rows], None if zero_point is None else zero_point[rows], scheme)
    return QuantizedTensor(codes, parameters.scale, parameters.zero_point, parameters.global_scale, scheme, x.dtype)


def fake_quantize(x: Tensor, scheme: QuantScheme, parameters: QuantizationParameters | None = None, check: bool = True) -> Tensor:
    """The values of ``quantize(x, scheme, parameters).dequantize()``, bit for bit, without making codes.

    Rows are worked on in chunks that stay in the cache. ``check`` False skips the search of ``x`` for NaN and infinity under given
    ``parameters``; there such values give values without meaning. Raises as ``quantize`` does.
    """
    if parameters is None:
        parameters = find_parameters(x, scheme)
    else:
        _check_dtype(x)
        if check:
            _check_finite(x)
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return result
    values, step, zero_point = _by_rows(x.detach(), parameters, scheme)
    step = step.to(compute_dtype(x.dtype))
    zero = step == 0
    divisor, any_zero, result_by_rows = step.masked_fill(zero, math.inf), bool(zero.any()), result.view(values.shape)
    for rows in row_slices(values):
        units = values[rows].to(step.dtype) / divisor[rows]
        if any_zero:
            units.masked_fill_(zero[rows], 0.0)  # x/inf would keep the sign of x
        units = round_units_(units, None if zero_point is None else zero_point[rows], scheme)
        if result.dtype == units.dtype:
            torch.mul(units, step[rows], out=result_by_rows[rows])
        else:
            result_by_rows[rows] = units.mul_(step[rows])
    return result


def step_size(parameters: QuantizationParameters, scheme: QuantScheme, shape: tuple[int, ...]) -> Tensor:
    """Float32 steps (scale x global scale) of a tensor of ``shape``, one per row and group: (*batch, rows, groups), expanded."""
    return effective_step(parameters, scheme).expand(_row_shape(scheme, shape))


def zero_points(parameters: QuantizationParameters, scheme: QuantScheme, shape: tuple[int, ...]) -> Tensor | None:
    """Float32 zero points in the shape of ``step_size``; None for symmetric schemes."""
    return None if parameters.zero_point is None else parameters.zero_point.float().expand(_row_shape(scheme, shape))


def _row_shape(scheme: QuantScheme, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(*batch, rows, groups) of a tensor of ``shape``."""
    *batch, _, groups = scheme.scale_shape(shape)
    return (*batch, shape[-2] if len(shape) > 1 else 1, groups)


def _by_rows(x: Tensor, parameters: QuantizationParameters, scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """``x`` as (rows of the whole batch, groups, size), with its steps and zero points as (rows, groups, 1)."""
    step, zero_point = step_size(parameters, scheme, x.shape), zero_points(parameters, scheme, x.shape)
    rows, groups = math.prod(step.shape[:-1]), step.shape[-1]
    zero_point = None if zero_point is None else zero_point.reshape(rows, groups, 1)
    return x.reshape(rows, groups, -1), step.reshape(rows, groups, 1), zero_point


def _scale_blocks(x: Tensor, scheme: QuantScheme, scale_shape: tuple[int, ...]) -> Tensor:
    """``x`` as (rows, groups, size) with one scale per (row, group); the matrix of a per-tensor scale is one row."""
    if not x.numel():
        return x.new_zeros(math.prod(scale_shape[:-1]), scale_shape[-1], 0)
    return x.reshape(math.prod(scale_shape[:-1]), scale_shape[-1], -1)


def _global_scale(span: Tensor, scheme: QuantScheme, shape: tuple[int, ...], given: Tensor | float | None) -> Tensor | None:
    """The global scale that puts the largest block's scale at the top of the scale format, or the one given; float32."""
    if scheme.global_scale == "none":
        if given is not None:
            raise ConfigError("a global_scale was given, but the scheme has global_scale 'none'")
        return None
    if given is not None:
        given = torch.as_tensor(given, dtype=torch.float32, device=span.device)
        if not bool((torch.isfinite(given) & (given >= 0)).all()):
            raise NumericalFailure("the given global_scale is not finite and at least 0")
        return given
    if scheme.global_scale == "static":
        raise ConfigError("global_scale 'static' is given from outside: pass find_parameters(x, scheme, global_scale=...)")
    if not span.numel():
        return span.new_zeros(scheme.global_scale_shape(shape))
    return span.amax((-1,) if scheme.global_scale == "token" else (-2, -1), keepdim=True) / (scheme.limit * scheme.storage.maximum)


def _search(values: Tensor, low: Tensor | None, high: Tensor, scheme: QuantScheme, global_scale: Tensor | None):
    """``search_ranges`` on (rows, groups) views, back in the shape of the ranges."""
    shape = high.shape
    if global_scale is not None:
        global_scale = global_scale.expand(*shape[:-1], 1).reshape(-1, 1)
    found = search_ranges(values, None if low is None else low.reshape(values.shape[:2]), high.reshape(values.shape[:2]), scheme, global_scale)
    return tuple(None if end is None else end.reshape(shape) for end in found)


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise ConfigError(f"dtype {x.dtype} cannot be quantized; accepted: {', '.join(str(dtype) for dtype in _DTYPES)}")


def _check_finite(x: Tensor) -> None:
    if x.numel() and not bool(torch.isfinite(x).all()):
        raise NumericalFailure(_not_finite(x))


def _not_finite(x: Tensor) -> str:
    """What is wrong with ``x``, counted."""
    nan, infinite = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    if nan or infinite:
        return f"the tensor to quantize, of shape {tuple(x.shape)}, holds {nan} NaN and {infinite} infinite values"
    return f"the range of the tensor to quantize, of shape {tuple(x.shape)}, exceeds float32"
