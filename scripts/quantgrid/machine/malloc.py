"""Allocator settings: keep freed memory, or return it to the system for very large layers.

The workflow starts jobs with ``KEEP_FREED``: fresh pages for every large tensor cost up to a third
of a quantization. glibc then leaves gaps in the kept memory (a block does not fit in the place of
an aligned one of the same size), most of a layer for every layer read. Layers too large to be
quantized together return their blocks to the system instead, so that the peak does not grow with
depth. Results are the same either way.
"""

from __future__ import annotations

import ctypes

from ..models.counts import held_moments, layer_weights
from ..models.shapes import ModelShape

KEEP_FREED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}  # variables that glibc reads when a process starts
# bytes of layers that are quantized together; a larger layer is quantized alone
LARGE = 1 << 29
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_BLOCK = 1 << 20  # bytes of a block that glibc maps separately and unmaps when it is freed


def layer_bytes(shape: ModelShape) -> int:
    """Bytes of weights and second moments of one decoder layer in float64, of experts in float32."""
    width = 4 if shape.experts else 8
    return width * layer_weights(shape) + 8 * held_moments(shape)


def gives_back(shape: ModelShape) -> bool:
    """Check whether jobs on a model of ``shape`` release the memory of a layer before the next."""
    return layer_bytes(shape) > LARGE


def fit_allocator(shape: ModelShape) -> None:
    """Return large freed blocks to the system if a model of ``shape`` needs it (glibc only)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and gives_back(shape):
        for parameter, value in ((_MMAP_MAX, 1 << 16), (_MMAP_THRESHOLD, _BLOCK), (_TRIM_THRESHOLD, 64 * _BLOCK)):
            mallopt(parameter, value)
