"""Range of every scale block: extremes, percentiles, or a search for the best clipping.

Values have shape (rows, groups, size), one scale block per (row, group); a per-tensor scale is one
row with one group. Sources: clip ratio and weight clip search of QuaRot (arXiv 2404.00456) and
SpinQuant (2405.16406), the observer of MR-GPTQ (2509.23202), errors left out of a search (APQ-ViT,
2303.14341; SignRound v2, 2512.04746).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from ..schemes.quant_scheme import QuantScheme
from .rounding import compute_dtype, round_values_
from .scales import QuantizationParameters, block_span, choose, effective_step, range_parameters

# Elements processed at a time, per thread: few enough for the last-level cache, enough to hide the
# overhead of some 60 calls.
_CACHED_ELEMENTS = 262144
_DEVICE_ELEMENTS = 1 << 26
# Up to this width, comparing the halves of a block elementwise is faster than a reduction, and
# pooling is faster than either.
_SHORT_BLOCK = 32
SLACK = 1e-4  # relative; errors are float32 sums


def chunk_elements(values: Tensor) -> int:
    """Number of elements to process at a time: bounded by the cache on a CPU, by memory on a
    GPU."""
    return _CACHED_ELEMENTS * torch.get_num_threads() if values.device.type == "cpu" else _DEVICE_ELEMENTS


def row_slices(values: Tensor) -> Iterator[slice]:
    """Slices of the rows of ``values`` (rows, groups, size), about ``chunk_elements`` elements
    each."""
    rows = max(1, chunk_elements(values) // max(1, values.shape[1] * values.shape[2]))
    return (slice(start, start + rows) for start in range(0, max(1, values.shape[0]), rows))


def block_ranges(values: Tensor, scheme: QuantScheme) -> tuple[Tensor | None, Tensor]:
    """Float32 ends (low, high) of every block, each (rows, groups), times ``clip_ratio``.

    The ends are the extremes or percentiles. Symmetric schemes get low None and the largest
    magnitude; asymmetric ranges always contain 0. NaN and infinity propagate to the result.
    """
    find, wide = _percentiles if scheme.range == "percentile" else _extremes, compute_dtype(values.dtype)
    ends = [
        find(values[rows].to(wide), scheme) for rows in row_slices(values)
    ]  # 16-bit reductions take longer than the copy and the wide ones
    low, high = (None if end[0] is None else torch.cat(end).float() for end in zip(*ends))
    # the clamp may leave -0, and with it negative zeros as scales
    high = high.clamp_(min=0).abs_().mul_(scheme.clip_ratio)  # type: ignore[union-attr]
    return None if low is None else low.clamp_(max=0).mul_(scheme.clip_ratio), high


def clamp_ranges(x: Tensor, low: Tensor, high: Tensor, size: int, symmetric: bool) -> Tensor:
    """Clamp every run of ``size`` elements of ``x`` (..., n) to [low x minimum, high x maximum].

    Minimum and maximum are those of the run, extended to contain 0. ``low``, ``high`` in (0, 1]
    broadcast to (..., n / size). ``symmetric`` clamps to plus and minus the larger magnitude of the
    two ends, because a symmetric scheme has one scale for both. Differentiable.
    """
    blocks = x.unflatten(-1, (-1, size))
    smallest, largest = blocks.amin(-1).clamp(max=0) * low.to(x), blocks.amax(-1).clamp(min=0) * high.to(x)
    if symmetric:
        largest = torch.maximum(-smallest, largest)
        smallest = -largest
    return blocks.clamp(smallest.unsqueeze(-1), largest.unsqueeze(-1)).flatten(-2)


def search_parameters(values: Tensor, low: Tensor | None, high: Tensor, scheme: QuantScheme,
                      global_scale: Tensor | None) -> QuantizationParameters:  # fmt: skip
    """Parameters minimizing the sum of |x - quantized x|**mse_norm in every block of ``values``.

    ``values`` is (rows, groups, size); ``low`` and ``high`` (rows, groups) are the float32 ends of
    the ranges; ``global_scale`` (rows, 1) is fixed. Candidates are the ranges times
    :func:`shrink_factors`, and the smallest stored scale that covers the whole range where the
    scale of the scheme does not. Ties go to the largest scale; the error never exceeds that of the
    full range. The sum leaves out the smallest and largest errors of a block (``trim_low``,
    ``trim_high``). Under ``four_six`` the candidates are the scales that make the largest element 6 and
    4, the errors are squared, and ties go to 6.
    """
    if scheme.range == "four_six":
        scheme = replace(scheme, mse_norm=2.0)
    found = []
    for rows in row_slices(values):
        ends = [None if end is None else end[rows] for end in (low, high, global_scale)]
        found.append(_search(values[rows], *ends[:2], scheme, ends[2]))  # type: ignore[call-arg, arg-type]
    scales, zero_points = ([getattr(part, name) for part in found] for name in ("scale", "zero_point"))
    return QuantizationParameters(torch.cat(scales), None if low is None else torch.cat(zero_points), global_scale)


def _search(values: Tensor, low: Tensor | None, high: Tensor, scheme: QuantScheme,
            global_scale: Tensor | None) -> QuantizationParameters:  # fmt: skip
    """Best parameters of some rows; the search stops once no smaller scale can be better for any
    block, unless the largest errors do not count."""
    span, found, least = block_span(low, high), None, torch.full_like(high, math.inf)
    for parameters in _candidates(low, high, scheme, global_scale):
        if found is not None and low is None and not scheme.trim_high:
            hopeless = saturation(span, parameters, scheme) > least * (1 + SLACK)
            if bool((hopeless | (span == 0)).all()):
                break
        error = block_errors(values, parameters, span, scheme)
        found = parameters if found is None else choose(error < least, parameters, found)
        least = torch.minimum(least, error)
    return found  # type: ignore[return-value]


def _candidates(low: Tensor | None, high: Tensor, scheme: QuantScheme,
                global_scale: Tensor | None) -> Iterator[QuantizationParameters]:  # fmt: skip
    """Candidate parameters, large scales first; symmetric duplicates of the predecessor are
    skipped."""
    if scheme.range == "four_six":
        yield from (range_parameters(low, high * factor, scheme, global_scale) for factor in (1.0, 1.5))
        return
    covering, last = (range_parameters(low, high, scheme, global_scale, covering=up) for up in (True, False))
    if not torch.equal(covering.scale, last.scale):
        yield covering
    yield last
    for factor in shrink_factors(scheme)[1:]:
        shrunk = range_parameters(None if low is None else low * factor, high * factor, scheme, global_scale)
        if low is None and torch.equal(shrunk.scale, last.scale):
            continue
        last = shrunk
        yield shrunk


def saturation(span: Tensor, parameters: QuantizationParameters, scheme: QuantScheme) -> Tensor:
    """Lower bound on the block error at this and every smaller scale of a symmetric scheme.

    It is the error |x - quantized x|**mse_norm of the largest element of each block from saturation
    alone, in units of its ``span``. For an integer the lowest code is used, whatever the sign.
    """
    element = scheme.element_format
    largest = 2.0 ** (element.bits - 1) if element.kind == "integer" else scheme.limit
    reach = effective_step(parameters, scheme) * largest
    return torch.where(span > 0, (span - reach).clamp(min=0) / span, 0.0).pow(scheme.mse_norm)


def shrink_factors(scheme: QuantScheme) -> list[float]:
    """Factors p = 1 - i/mse_steps of ``range: mse``, widest first.

    A symmetric e8m0 scale takes few values: powers of two and the last factor reach all of them.
    """
    count = max(1, round(scheme.mse_grid * scheme.mse_steps))
    factors = [1 - i / scheme.mse_steps for i in range(min(count, scheme.mse_steps))]
    if scheme.scale_format == "e8m0" and scheme.symmetric:
        powers = [2.0**-k for k in range(32) if 2.0**-k > factors[-1]]
        return [*powers, factors[-1]]
    return factors


def block_errors(values: Tensor, parameters: QuantizationParameters, span: Tensor, scheme: QuantScheme) -> Tensor:
    """Sum over each block of |value - quantized value|**mse_norm, in units of the block's ``span``, without
    the shares ``trim_low`` and ``trim_high`` of the smallest and largest errors.

    The result is float32, without the last dimension of ``values``.
    """
    errors, count = _errors(values, parameters, span, scheme), values.shape[-1]
    first, last = whole(scheme.trim_low, count), count - whole(scheme.trim_high, count)
    if last - first < count:
        return torch.cat([*errors], -1).sort(-1).values[..., first:last].sum(-1).float()
    total = torch.zeros_like(span)
    for error in errors:
        total += error.sum(-1).float()
    return total


def whole(share: float, count: int) -> int:
    """Whole elements in a share of ``count``; 0.29 of 100 is 29, whatever the product of the floats."""
    return int(share * count + 1e-9)


def _errors(values: Tensor, parameters: QuantizationParameters, span: Tensor, scheme: QuantScheme) -> Iterator[Tensor]:
    """|value - quantized value|**mse_norm in units of ``span``, for pieces of the last dimension."""
    dtype = compute_dtype(values.dtype)
    step = effective_step(parameters, scheme).to(dtype).unsqueeze(-1)
    zero_point = None if parameters.zero_point is None else parameters.zero_point.to(dtype).unsqueeze(-1)
    unit = torch.where(span > 0, 1 / span, 0.0).to(dtype).unsqueeze(-1)
    for piece in values.split(max(1, chunk_elements(values)), dim=-1):
        error = round_values_(piece.to(dtype, copy=True), step, zero_point, scheme).sub_(piece).mul_(unit).abs_()
        yield error.square_() if scheme.mse_norm == 2 else error.log2_().mul_(scheme.mse_norm).exp2_()


def _extremes(values: Tensor, scheme: QuantScheme) -> tuple[Tensor | None, Tensor]:
    """Smallest and largest element of every block, NaN if it has one.

    Symmetric schemes get None and the largest magnitude.
    """
    if values.shape[-1] == 0:
        zeros = values.new_zeros(values.shape[:-1])
        return None if scheme.symmetric else zeros, zeros.clone()
    if scheme.symmetric:
        return None, _largest_magnitude(values)
    low = high = values
    while 2 < high.shape[-1] <= _SHORT_BLOCK and high.shape[-1] % 2 == 0:
        low, high = torch.minimum(*low.chunk(2, dim=-1)), torch.maximum(*high.chunk(2, dim=-1))
    return low.amin(-1), high.amax(-1)


def _largest_magnitude(values: Tensor) -> Tensor:
    """Largest magnitudes (rows, groups) of non-empty ``values`` (rows, groups, size)."""
    if values.shape[-1] > _SHORT_BLOCK or values.device.type != "cpu":
        return torch.maximum(-values.amin(-1), values.amax(-1))
    return max_pool1d(values.abs().flatten(1), values.shape[-1])


def percentile_rank(scheme: QuantScheme, size: int) -> int:
    """Nearest rank (from 1) of the scheme's percentile among ``size`` values."""
    return max(1, math.ceil(scheme.percentile / 100 * size))


def _percentiles(values: Tensor, scheme: QuantScheme) -> tuple[Tensor | None, Tensor]:
    """Nearest-rank percentile of |x|, or of x and -x, per block; NaN where the sum is not
    finite."""
    rank = percentile_rank(scheme, values.shape[-1])
    finite = torch.isfinite(values).all(-1)

    def ranked(x: Tensor) -> Tensor:
        return (
            torch.where(finite, x.kthvalue(rank, dim=-1).values, math.nan) if x.numel() else x.new_zeros(x.shape[:-1])
        )

    return (None, ranked(values.abs())) if scheme.symmetric else (-ranked(-values), ranked(values))
