"""Checks of tensors to quantize: their dtype and their values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ground.errors import ConfigError, NumericalFailure

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dtype(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise ConfigError(
            f"dtype {x.dtype} cannot be quantized; accepted: {', '.join(str(dtype) for dtype in _DTYPES)}"
        )


def check_finite(x: Tensor) -> None:
    if x.numel() and not all(math.isfinite(end) for end in x.detach().aminmax()):
        raise NumericalFailure(not_finite(x))


def not_finite(x: Tensor) -> str:
    """Error message for non-finite ``x``, with counts."""
    nan, infinite = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    if nan or infinite:
        return f"the tensor to quantize, of shape {tuple(x.shape)}, holds {nan} NaN and {infinite} infinite values"
    return f"the range of the tensor to quantize, of shape {tuple(x.shape)}, exceeds float32"
