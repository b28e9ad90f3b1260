"""Exhaustive search for the best block scale in a narrow scale format (``range: exhaustive``).

For float elements only. Two facts leave few candidates; the result equals that of trying every code
(tested). Let c be the smallest scale that covers the block, c * maximum >= max |x|.

1. For s >= 2c with s/2 in the scale format, s/2 is at least as good: doubling maps the element's
   values onto its values, so those of s/2 hold every value of s within the block's range. The
   only candidates above 2c are scales whose half is not in the format.
2. The largest element alone leaves (max |x| - s * maximum)**mse_norm, which grows as s shrinks:
   once it exceeds the best error found, no smaller scale can be better.

Scales are tried in descending order, so that ties go to the largest scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..schemes.number_formats import ScaleFormat
from ..schemes.quant_scheme import QuantScheme
from .ranges import SLACK, block_errors, reach, row_slices, saturation
from .scales import STORAGE_DTYPES, QuantizationParameters


def search_scales(values: Tensor, high: Tensor, scheme: QuantScheme, global_scale: Tensor | None) -> Tensor:
    """Stored scales (rows, groups) minimizing the sum of |x - quantized x|**mse_norm in every
    block.

    ``values`` is (rows, groups, size); ``high`` (rows, groups) the largest magnitudes, float32;
    ``global_scale`` (rows, 1) or None is fixed.
    """
    if global_scale is not None:
        global_scale = global_scale.expand_as(high)
    codes = [
        _search(values[rows], high[rows], scheme, None if global_scale is None else global_scale[rows])
        for rows in row_slices(values)
    ]
    return _stored(torch.cat(codes), scheme.storage)


def _search(values: Tensor, high: Tensor, scheme: QuantScheme, global_scale: Tensor | None) -> Tensor:
    """Codes (rows, groups) of the best scales; blocks drop out once no smaller scale can be
    better."""
    values, high, shape = values.flatten(0, 1), high.flatten(), high.shape
    global_scale = None if global_scale is None else global_scale.flatten()
    code = _largest_candidates(high, scheme, global_scale)
    found, best = code.clone(), torch.full_like(high, math.inf)
    open_blocks = torch.arange(len(high), device=high.device)
    while len(open_blocks):
        tried, peak = code[open_blocks], high[open_blocks]
        level = None if global_scale is None else global_scale[open_blocks]
        error = block_errors(values[open_blocks], _parameters(tried, level, scheme), peak, scheme)
        better = error < best[open_blocks]
        found[open_blocks[better]], best[open_blocks[better]] = tried[better], error[better]
        smaller = (tried - 1).clamp(min=0)
        ends = [(peak, reach(_parameters(smaller, level, scheme), scheme))]
        going_on = (tried > 0) & (saturation(ends, peak, scheme) <= best[open_blocks] * (1 + SLACK))
        open_blocks = open_blocks[going_on]
        code[open_blocks] -= 1
    return found.reshape(shape)


def _largest_candidates(high: Tensor, scheme: QuantScheme, global_scale: Tensor | None) -> Tensor:
    """Largest code worth trying per block (int64).

    It is the last code below twice the smallest covering scale, or the last one without a half in
    the format.
    """
    storage = scheme.storage
    table = torch.tensor(_scale_values(storage)).to(high.device)
    unit = scheme.limit * scheme.scale_multiplier * (1.0 if global_scale is None else global_scale)
    wanted = torch.where(high > 0, high / unit, 0.0) * (1 + SLACK)
    covering = table[torch.searchsorted(table, wanted).clamp_(max=len(table) - 1)]
    below_twice = torch.searchsorted(table, 2 * covering) - 1
    without_half = {"float": 2 ** (storage.mantissa_bits + 1), "integer": len(table), "exponent": 1}[storage.kind] - 1
    return below_twice.clamp_(without_half, len(table) - 1).masked_fill_(high == 0, 0)


def _scale_values(storage: ScaleFormat) -> list[float]:
    """Finite values of the codes without a sign bit, in code order, which is ascending."""
    codes = 2 ** (storage.bits - (storage.kind != "exponent"))
    return [value for value in storage.values()[:codes] if math.isfinite(value)]


def _stored(codes: Tensor, storage: ScaleFormat) -> Tensor:
    patterns = codes.to(torch.uint8)
    return patterns.view(STORAGE_DTYPES[storage.name]) if storage.name in STORAGE_DTYPES else patterns


def _parameters(codes: Tensor, global_scale: Tensor | None, scheme: QuantScheme) -> QuantizationParameters:
    return QuantizationParameters(_stored(codes, scheme.storage), None, global_scale)
