"""What becomes of memory that a job frees. The workflow tells jobs to keep it (``KEEP_FREED``): fresh pages for every large tensor
cost up to a third of a quantization.

glibc leaves gaps in what is kept (a block does not fit where an aligned one of its size was), most of a layer for every layer that is read.
Where layers are so large that each is worked on by itself, their blocks go back to the system instead: that is the price of a peak that does
not grow with depth. Results are the same either way.
"""

from __future__ import annotations

import ctypes

from .architecture import ModelShape, layer_moments, layer_weights

KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}  # variables that glibc reads when a process starts
LARGE = 1 << 29  # bytes of layers that are quantized together; a larger layer is quantized by itself
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_BLOCK = 1 << 20  # bytes of a block that is mapped by itself and unmapped when it is freed


def layer_bytes(shape: ModelShape) -> int:
    """Weights and second moments of one decoder layer in float64."""
    return 8 * (layer_weights(shape) + layer_moments(shape))


def gives_back(shape: ModelShape) -> bool:
    """Whether jobs on a model of ``shape`` give back the memory of each layer before the next one."""
    return layer_bytes(shape) > LARGE


def fit_allocator(shape: ModelShape) -> None:
    """Let this process give large blocks back, if a model of ``shape`` asks for it; an allocator other than glibc's is left as it is."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and gives_back(shape):
        for parameter, value in ((_MMAP_MAX, 1 << 16), (_MMAP_THRESHOLD, _BLOCK), (_TRIM_THRESHOLD, 64 * _BLOCK)):
            mallopt(parameter, value)
