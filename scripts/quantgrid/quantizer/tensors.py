"""Quantization of tensors under a ``QuantScheme``: stored codes and scales, or rounded values.

Tensors are (*batch, rows, n): scale blocks run along the last dimension, and every (rows, n) matrix
of the batch is a separate tensor. One dimension is one row. Sources of the definitions:
docs/reference/formats.md. Nothing here carries gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..ground.errors import ConfigError, NumericalFailure
from ..schemes.quant_scheme import CODEBOOK_BITS, FLOAT_BITS, QuantScheme
from .codebooks import fit_codebooks
from .four_six import choose_scales
from .ranges import block_ranges, row_slices, search_parameters
from .rounding import compute_dtype, decode, encode, round_values_
from .scale_search import search_scales
from .scales import QuantizationParameters, block_span, effective_step, range_parameters
from .tensor_checks import check_dtype, check_finite, not_finite

_Parts = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class QuantizedTensor:
    """Quantized tensor as stored: ``codes`` in the original shape, ``QuantizationParameters``."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None
    scheme: QuantScheme
    dtype: torch.dtype
    codebook: Tensor | None = None

    @property
    def parameters(self) -> QuantizationParameters:
        return QuantizationParameters(self.scale, self.zero_point, self.global_scale, self.codebook)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Values in the shape of ``codes``, in ``dtype`` (default: dtype of the original
        tensor)."""
        dtype = self.dtype if dtype is None else dtype
        result = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        if self.codes.numel():
            codes, parts = _by_rows(self.codes, self.parameters, self.scheme)
            values = result.view(codes.shape)
            for rows in row_slices(codes):
                step, zero_point, codebook = _rows_of(parts, rows)
                values[rows] = decode(codes[rows], step, zero_point, self.scheme, dtype, codebook)
        return result

    def bits(self) -> float:
        """Average stored bits per element: codes, scales, zero points, codebooks, global scales."""
        if not self.codes.numel():
            return 0.0
        bits = self.codes.numel() * self.scheme.element_format.bits + self.scale.numel() * self.scheme.storage.bits
        bits += 0 if self.zero_point is None else self.zero_point.numel() * self.scheme.zero_point_bits
        bits += 0 if self.global_scale is None else self.global_scale.numel() * FLOAT_BITS
        bits += 0 if self.codebook is None else self.codebook.numel() * CODEBOOK_BITS
        return bits / self.codes.numel()


def find_parameters(
    x: Tensor, scheme: QuantScheme, global_scale: Tensor | float | None = None
) -> QuantizationParameters:
    """Scales, zero points and global scales of ``x`` (*batch, rows, n), as stored.

    Args:
        x: float16, bfloat16, float32 or float64.
        scheme: its group size has to divide n.
        global_scale: replaces the one computed from ``x`` (several linears may share one); required
        by ``static`` and ``site`` schemes. A number, or a tensor that broadcasts to (*batch, rows or 1, 1).

    Raises:
        ConfigError: for a shape, dtype or global scale that the scheme does not accept.
        NumericalFailure: if a range is not finite (NaN or infinity in ``x``, or beyond float32).
    """
    return _find(x, scheme, global_scale)


def _find(
    x: Tensor, scheme: QuantScheme, global_scale: Tensor | float | None, rounded: Tensor | None = None
) -> QuantizationParameters:
    """``find_parameters``; under ``range: four_six`` ``rounded`` (contiguous, as ``x``) receives the rounded values."""
    check_dtype(x)
    shape = scheme.scale_shape(x.shape)
    values = _scale_blocks(x.detach(), scheme, shape)
    low, high = block_ranges(values, scheme)
    span = block_span(low, high)
    if span.numel() and not math.isfinite(span.amax()):
        raise NumericalFailure(not_finite(x))
    low, high = (None if end is None else end.reshape(shape) for end in (low, high))  # type: ignore[assignment]
    global_scale = _global_scale(span.reshape(shape), scheme, x.shape, global_scale)
    if scheme.range in ("exhaustive", "four_six") and x.numel():
        search = partial(choose_scales, rounded=rounded) if scheme.range == "four_six" else search_scales
        return QuantizationParameters(_best_scales(search, values, high, scheme, global_scale), None, global_scale)
    if scheme.range == "mse" and x.numel():
        return _best_parameters(values, low, high, scheme, global_scale)
    parameters = range_parameters(low, high, scheme, global_scale)
    return (
        replace(parameters, codebook=_fit(values, parameters, scheme))
        if scheme.element_format.kind == "kmeans"
        else parameters
    )


def quantize(x: Tensor, scheme: QuantScheme, parameters: QuantizationParameters | None = None) -> QuantizedTensor:
    """Round ``x`` (*batch, rows, n) to codes under ``parameters`` (default: computed from ``x``).

    Symmetric integer codes are int8, asymmetric ones uint8; codes of floats and codebooks are uint8
    bit patterns. Raises as ``find_parameters``; with given parameters also for NaN or infinity in
    ``x``.
    """
    if parameters is None:
        parameters = find_parameters(x, scheme)
    else:
        check_dtype(x)
        check_finite(x)
    signed = scheme.code_range[0] < 0
    codes = torch.empty(x.shape, dtype=torch.int8 if signed else torch.uint8, device=x.device)
    if x.numel():
        values, parts = _by_rows(x.detach(), parameters, scheme)
        codes_by_rows = codes.view(values.shape)
        for rows in row_slices(values):
            step, zero_point, codebook = _rows_of(parts, rows)
            codes_by_rows[rows] = encode(values[rows], step, zero_point, scheme, codebook)
    return QuantizedTensor(
        codes, parameters.scale, parameters.zero_point, parameters.global_scale, scheme, x.dtype, parameters.codebook
    )


def fake_quantize(
    x: Tensor,
    scheme: QuantScheme,
    parameters: QuantizationParameters | None = None,
    check: bool = True,
    global_scale: Tensor | float | None = None,
) -> Tensor:
    """Values of ``quantize(x, scheme, parameters).dequantize()``, bit-identical, without codes.

    Rows are processed in chunks that stay in the cache: first the ranges of all rows, then the
    values. ``check=False`` skips the test of ``x`` for NaN and infinity under given ``parameters``;
    results for such values are undefined. ``global_scale`` is that of ``find_parameters``, and is not
    accepted beside ``parameters``. Raises as ``quantize``.
    """
    check_dtype(x)
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if parameters is None:
        parameters = _find(x, scheme, global_scale, result)
        if scheme.range == "four_six":
            return result
    elif global_scale is not None:
        raise ConfigError("global_scale is given beside parameters, which have one: one of the two is accepted")
    elif check:
        check_finite(x)
    # refuses an indivisible group size, for an empty tensor too
    scheme.scale_shape(x.shape)
    if not x.numel():
        return result
    values = x.detach().reshape(-1, 1, x.shape[-1])
    parts = _by_rows(x, parameters, scheme)[1]
    slices = list(row_slices(values))
    work = torch.empty(values[slices[0]].shape, dtype=compute_dtype(x.dtype), device=x.device)
    for rows in slices:
        block = values[rows]
        block = work[: len(block)].copy_(block).squeeze(1)
        step, zero_point, codebook = _rows_of(parts, rows)
        rounded = round_values_(block.view(len(block), step.shape[1], -1), step, zero_point, scheme, codebook)
        result.view(values.shape)[rows] = rounded.view(len(block), 1, -1)
    return result


def step_size(parameters: QuantizationParameters, scheme: QuantScheme, shape: tuple[int, ...]) -> Tensor:
    """Float32 steps (scale x global scale) of a tensor of ``shape``: (*batch, rows, groups),
    expanded."""
    return effective_step(parameters, scheme).expand(_row_shape(scheme, shape))


def zero_points(parameters: QuantizationParameters, scheme: QuantScheme, shape: tuple[int, ...]) -> Tensor | None:
    """Float32 zero points in the shape of ``step_size``; None for symmetric schemes."""
    return None if parameters.zero_point is None else parameters.zero_point.float().expand(_row_shape(scheme, shape))


def codebooks(parameters: QuantizationParameters, scheme: QuantScheme, shape: tuple[int, ...]) -> Tensor | None:
    """Codebooks (*batch, rows, groups, 2**bits), expanded as ``step_size``; None without
    k-means."""
    if parameters.codebook is None:
        return None
    return parameters.codebook.expand(*_row_shape(scheme, shape), parameters.codebook.shape[-1])


def _row_shape(scheme: QuantScheme, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(*batch, rows, groups) of a tensor of ``shape``."""
    *batch, _, groups = scheme.scale_shape(shape)
    return (*batch, shape[-2] if len(shape) > 1 else 1, groups)


def _by_rows(x: Tensor, parameters: QuantizationParameters, scheme: QuantScheme) -> tuple[Tensor, _Parts]:
    """``x`` as (rows of the whole batch, groups, size), with steps, zero points and codebooks.

    Steps and zero points are (rows, groups, 1), codebooks (rows, groups, entries).
    """
    parts = (
        step_size(parameters, scheme, x.shape),
        zero_points(parameters, scheme, x.shape),
        codebooks(parameters, scheme, x.shape),
    )
    rows, groups = math.prod(parts[0].shape[:-1]), parts[0].shape[-1]
    return x.reshape(rows, groups, -1), tuple(
        None if part is None else part.reshape(rows, groups, -1) for part in parts
    )  # type: ignore[return-value]


def _rows_of(parts: _Parts, rows: slice) -> _Parts:
    return tuple(None if part is None else part[rows] for part in parts)  # type: ignore[return-value]


def _scale_blocks(x: Tensor, scheme: QuantScheme, scale_shape: tuple[int, ...]) -> Tensor:
    """``x`` as (rows, groups, size) with one scale per (row, group).

    With a per-tensor scale the matrix is one row.
    """
    if not x.numel():
        return x.new_zeros(math.prod(scale_shape[:-1]), scale_shape[-1], 0)
    return x.reshape(math.prod(scale_shape[:-1]), scale_shape[-1], -1)


def _global_scale(
    span: Tensor, scheme: QuantScheme, shape: tuple[int, ...], given: Tensor | float | None
) -> Tensor | None:
    """Float32 global scale: the given one, or the one that maps the largest scale to the format
    maximum."""
    if scheme.global_scale == "none":
        if given is not None:
            raise ConfigError("global_scale is given, but the scheme has global_scale 'none'")
        return None
    if given is not None:
        given = torch.as_tensor(given, dtype=torch.float32, device=span.device)
        if not bool((torch.isfinite(given) & (given >= 0)).all()):
            raise NumericalFailure("global_scale is not a finite number of at least 0")
        return given
    if scheme.global_scale in ("static", "site"):
        raise ConfigError(
            f"global_scale '{scheme.global_scale}' needs a given global_scale: "
            "pass find_parameters(x, scheme, global_scale=...)"
        )
    if not span.numel():
        return span.new_zeros(scheme.global_scale_shape(shape))  # type: ignore[arg-type]
    return span.amax((-1,) if scheme.global_scale == "token" else (-2, -1), keepdim=True) / (
        scheme.limit * scheme.largest_scale
    )


def _best_parameters(
    values: Tensor, low: Tensor | None, high: Tensor, scheme: QuantScheme, global_scale: Tensor | None
) -> QuantizationParameters:
    """``search_parameters`` on (rows, groups) views, back in the shape of the ranges."""
    shape, rows = high.shape, values.shape[:2]
    found = search_parameters(
        values, None if low is None else low.reshape(rows), high.reshape(rows), scheme, _per_row(global_scale, shape)
    )
    zero_point = None if found.zero_point is None else found.zero_point.reshape(shape)
    return QuantizationParameters(found.scale.reshape(shape), zero_point, global_scale)


def _best_scales(
    search: Callable[..., Tensor], values: Tensor, high: Tensor, scheme: QuantScheme, global_scale: Tensor | None
) -> Tensor:
    """Scales of ``search`` on (rows, groups) views, back in the shape of the ranges."""
    return search(values, high.reshape(values.shape[:2]), scheme, _per_row(global_scale, high.shape)).reshape(
        high.shape
    )


def _per_row(global_scale: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A global scale as (rows of the whole batch, 1), for scales of ``shape``."""
    return None if global_scale is None else global_scale.expand(*shape[:-1], 1).reshape(-1, 1)


def _fit(values: Tensor, parameters: QuantizationParameters, scheme: QuantScheme) -> Tensor:
    """Fit codebooks (*batch, rows, groups, 2**bits) to the scale blocks ``values``
    (rows, groups, size)."""
    step, entries = effective_step(parameters, scheme).reshape(*values.shape[:2], 1), 2**scheme.element_format.bits
    found = [
        fit_codebooks(torch.where(step[rows] > 0, values[rows] / step[rows], 0.0), entries, scheme.seed)
        for rows in row_slices(values)
    ]
    return torch.cat(found).reshape(*parameters.scale.shape, entries)
