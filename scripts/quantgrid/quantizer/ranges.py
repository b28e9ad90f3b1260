"""Range of every scale block: extremes, percentiles, or a search for the best clipping.

Values have shape (rows, groups, size), one scale block per (row, group); a per-tensor scale is one
row with one group. Sources: clip ratio and weight clip search of QuaRot (arXiv 2404.00456) and
SpinQuant (2405.16406), the observer of MR-GPTQ (2509.23202), errors left out of a search (APQ-ViT,
2303.14341; SignRound v2, 2512.04746).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..schemes.quant_scheme import QuantScheme
from .rounding import compute_dtype, round_values_
from .scales import QuantizationParameters, block_span, choose, effective_step, range_parameters

# Elements processed at a time, per thread: few enough for the last-level cache, enough to hide the
# overhead of some 60 calls.
_CACHED_ELEMENTS = 262144
_DEVICE_ELEMENTS = 1 << 26
# Up to the larger width and above the smaller one, comparing the halves of a block elementwise is
# faster than a reduction.
_SHORT_BLOCK, _FEW = 16, 4
SLACK = 1e-4  # relative; errors are float32 sums
EXACT = 1 - 2**-21  # of a float32 number, what the exact one has at least
MOST_LEFT = 0.8  # share of the blocks of a search up to which those that dropped out are not copied along
WIDE = ("fp32", "fp16", "bf16")  # scale formats


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
    ``trim_high``).
    """
    found = []
    for rows in row_slices(values):
        ends = [None if end is None else end[rows] for end in (low, high, global_scale)]
        found.append(_search(values[rows], *ends[:2], scheme, ends[2]))  # type: ignore[call-arg, arg-type]
    scales, zero_points = ([getattr(part, name) for part in found] for name in ("scale", "zero_point"))
    return QuantizationParameters(torch.cat(scales), None if low is None else torch.cat(zero_points), global_scale)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of a search: ``values`` (blocks, size); ends of the ranges, global scales and the magnitudes of the
    ``largest`` and ``smallest`` values (blocks,), float32."""

    values: Tensor
    low: Tensor | None
    high: Tensor
    global_scale: Tensor | None
    largest: Tensor
    smallest: Tensor

    def __getitem__(self, blocks: Tensor) -> _Blocks:
        parts = (getattr(self, field.name) for field in fields(self))
        return _Blocks(*(None if part is None else part[blocks] for part in parts))  # type: ignore[arg-type]

    @property
    def span(self) -> Tensor:
        return block_span(self.low, self.high)

    def parameters(self, factor: float, covering: bool, scheme: QuantScheme) -> QuantizationParameters:
        """Parameters of the ranges times ``factor``."""
        low = None if self.low is None else self.low * factor
        return range_parameters(low, self.high * factor, scheme, self.global_scale, covering)

    def least_errors(self, tried: QuantizationParameters, factor: float, scheme: QuantScheme) -> Tensor:
        """Lower bounds on the errors with the parameters ``tried``, those of ``factor``, and all later ones."""
        if self.low is not None:
            return saturation(_shifted_ends(self.low, self.high, factor, scheme), self.span, scheme)
        ends = [(self.largest, reach(tried, scheme)), (self.smallest, reach(tried, scheme, -1))]
        return saturation(ends, self.span, scheme)


def _search(values: Tensor, low: Tensor | None, high: Tensor, scheme: QuantScheme,
            global_scale: Tensor | None) -> QuantizationParameters:  # fmt: skip
    """Best parameters of some rows. A block is left out once no smaller scale can be better for it, unless the
    largest errors do not count."""
    values = values.flatten(0, 1)
    low, level = (None if end is None else end.expand(high.shape).flatten() for end in (low, global_scale))
    blocks = _Blocks(values, low, high.flatten(), level, values.amax(-1).float(), -values.amin(-1).float())
    left, least = torch.arange(len(values), device=high.device), torch.full_like(blocks.high, math.inf)
    found = best = last = None
    for factor, covering in _candidates(scheme):
        tried = blocks.parameters(factor, covering, scheme)
        if low is None and last is not None and torch.equal(tried.scale, last.scale):
            continue
        if best is not None and not scheme.trim_high:
            going_on = blocks.least_errors(tried, factor, scheme) <= least * (1 + SLACK)
            kept = (going_on & (blocks.span > 0)).nonzero().squeeze(1)
            if not len(kept):
                break
            if len(kept) < MOST_LEFT * len(left):
                found = best if found is None else found.replaced(left, best)
                left, least = left[kept], least[kept]
                blocks, tried, best = blocks[kept], tried[kept], best[kept]
        last, error = tried, block_errors(blocks.values, tried, blocks.span, scheme)
        best = tried if best is None else choose(error < least, tried, best)
        least = torch.minimum(least, error)
    return (best if found is None else found.replaced(left, best)).view(high.shape)  # type: ignore[union-attr, arg-type]


def _candidates(scheme: QuantScheme) -> Iterator[tuple[float, bool]]:
    """(Factor of the range, whether the scale has to cover it) of the candidates, large scales first."""
    yield 1.0, True
    yield from ((factor, False) for factor in shrink_factors(scheme))


def saturation(ends: Iterable[tuple[Tensor, Tensor]], span: Tensor, scheme: QuantScheme) -> Tensor:
    """Lower bound on the block error, |x - quantized x|**mse_norm in units of ``span``, from saturation alone.

    ``ends`` are pairs of a magnitude, that of one element of each block, and the largest that can be stored. Both
    may be rounded to float32.
    """
    beyond = (torch.where(span > 0, (end * EXACT - reach).clamp(min=0) / span, 0.0) for end, reach in ends)
    return sum(part.pow(scheme.mse_norm) for part in beyond)  # type: ignore[return-value]


def reach(parameters: QuantizationParameters, scheme: QuantScheme, sign: int = 1) -> Tensor:
    """Largest magnitude of this ``sign`` that a symmetric scheme can store, at these and all smaller scales."""
    lowest, highest = scheme.code_range if scheme.element_format.kind == "integer" else (-scheme.limit, scheme.limit)
    return effective_step(parameters, scheme) * (highest if sign > 0 else -lowest)


def _shifted_ends(low: Tensor, high: Tensor, factor: float, scheme: QuantScheme) -> list[tuple[Tensor, Tensor]]:
    """Ends of blocks for :func:`saturation`, asymmetric, at the ranges times ``factor`` and all smaller ones.

    A zero point, rounded to a code, moves the range by half a step at most, and a scale in at least 16 bits is
    within ``2**-8`` of the exact one, or within ``2**-24``. No ends where the scale is narrower.
    """
    if scheme.element_format.kind != "integer" or scheme.scale_format not in WIDE or scheme.global_scale != "none":
        return [(torch.zeros_like(high),) * 2]
    span = high - low
    step = span * (factor / scheme.limit) * (1 + 2**-8) + 2**-24
    beyond = span * factor * 2**-8 + scheme.limit * 2**-24 + step / 2
    return [(end, end * factor + beyond) for end in (high, -low)]


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
    return _reduced(values, torch.minimum, torch.amin), _reduced(values, torch.maximum, torch.amax)


def _largest_magnitude(values: Tensor) -> Tensor:
    """Largest magnitudes (rows, groups) of non-empty ``values`` (rows, groups, size)."""
    if values.device.type != "cpu":
        return torch.maximum(-values.amin(-1), values.amax(-1))
    return _reduced(values.abs(), torch.maximum, torch.amax)


def _reduced(values: Tensor, of_two: Callable[..., Tensor], of_all: Callable[..., Tensor]) -> Tensor:
    """Smallest or largest of the last dimension of ``values``, by functions of two tensors and of one dimension."""
    while _FEW < values.shape[-1] <= _SHORT_BLOCK and values.shape[-1] % 2 == 0:
        values = of_two(*values.chunk(2, dim=-1))
    return of_all(values, -1)


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
