"""``fake_quantize`` as one kernel, by torch.compile: the same values bit for bit, where a compiler exists (a C++ one for CPUs).

A compiled kernel reads the tensor twice, for the ranges and for the values, and writes it once; without a compiler every step of the
arithmetic is a pass over a chunk in the cache. Compiling takes seconds, once per scheme, dtype and shape: shapes and constants are compiled
in, because torch turns constants that vary into float64 arguments, which changes bits. E8M0 scales gain nothing: torch 2.13 does not
vectorize their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .errors import ConfigError
from .quantizer import QuantScheme, fake_quantize
from .rounding import round_values
from .scales import block_span, effective_step, range_parameters


@cache
def compile_fake_quantize(scheme: QuantScheme) -> Callable[[Tensor], Tensor]:
    """A function x -> ``fake_quantize(x, scheme)`` that compiles itself when it is first called; it raises as that does.

    Raises:
        ConfigError: for a scheme whose rows depend on one another, or whose ranges or codebooks are searched.
    """
    if not scheme.rows_are_independent or scheme.range != "minmax" or scheme.element_format.kind not in ("integer", "float"):
        raise ConfigError("compile_fake_quantize takes integer and float elements with range 'minmax', one scale per row or group, and global_scale "
                          f"'none' or 'token'; got {scheme.element}, {scheme.range}, {scheme.granularity}, {scheme.global_scale}")  # fmt: skip
    kernel = torch.compile(lambda rows: _fake_quantize(rows, scheme), dynamic=False)

    def compiled(x: Tensor) -> Tensor:
        if not x.numel() or not x.is_floating_point():
            return fake_quantize(x, scheme)
        values, largest = kernel(x.detach().reshape(-1, x.shape[-1]))
        return values.view(x.shape) if math.isfinite(largest) else fake_quantize(x, scheme)  # which says what is wrong

    return compiled


def _fake_quantize(rows: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """(rounded values, largest range) of ``rows`` (tokens, n), without synchronization."""
    blocks = rows.reshape(*scheme.scale_shape(rows.shape), -1)
    if scheme.symmetric:
        low, high = None, blocks.abs().amax(-1).float() * scheme.clip_ratio
    else:
        low, high = (end.float() * scheme.clip_ratio for end in (blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)))
    span = block_span(low, high)
    global_scale = span.amax(-1, keepdim=True) / (scheme.limit * scheme.storage.maximum) if scheme.global_scale == "token" else None
    parameters = range_parameters(low, high, scheme, global_scale)
    zero_point = None if parameters.zero_point is None else parameters.zero_point.float().unsqueeze(-1)
    return round_values(blocks, effective_step(parameters, scheme).unsqueeze(-1), zero_point, scheme).reshape(rows.shape), span.amax()
