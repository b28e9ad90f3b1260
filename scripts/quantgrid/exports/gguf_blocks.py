"""Rows of codes and scales as blocks of GGML types, byte for byte.

Blocks run along a row. A block of the integer types has 32 elements: one float16 step d (types
``_1``: also a float16 minimum m), the fifth bits, and the low nibbles of elements 0 to 15 with those
of 16 to 31 as high nibbles; its values are d (code - offset) or d code + m. MXFP4 has an E8M0 byte
and nibbles in the same order; NVFP4 has 64 elements: four E4M3 bytes, then for each 16 elements
eight bytes whose low nibbles are elements 0 to 7. Layouts: ``ggml-common.h`` of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..ground.errors import ConfigError
from ..quantizer.scales import effective_step
from ..quantizer.tensors import QuantizedTensor
from .gguf_capabilities import BLOCKS, Block, block_for

_HALF_MAXIMUM = 65504.0  # of float16


@dataclass(frozen=True)
class Blocks:
    """Rows of blocks (rows, bytes) uint8 of the type ``name``; ``scale``: a float32 factor of all
    values that the file holds as a tensor of one element."""

    name: str
    data: np.ndarray
    scale: np.ndarray | None = None


def blocks_of(quantized: QuantizedTensor, where: str) -> Blocks:
    """Blocks of a quantized weight (rows, n).

    Raises :class:`ConfigError`, naming ``where``, if no GGML type holds its scheme, if n is no
    multiple of the block, or if a step exceeds float16.
    """
    block: Block = block_for(quantized.scheme, where)  # type: ignore[assignment]
    length = quantized.codes.shape[-1]
    if length % block.size:
        raise ConfigError(f"{where}: rows of {length} elements; {block.name} accepts multiples of {block.size}")
    if block.name == "MXFP4":
        return Blocks(block.name, _mxfp4(quantized))
    if block.name == "NVFP4":
        return Blocks(block.name, _nvfp4(quantized), quantized.global_scale.float().reshape(1).numpy())  # type: ignore[union-attr]
    return Blocks(block.name, _integers(quantized, block, where))


def bfloat16_bytes(values: Tensor) -> np.ndarray:
    """``values`` (*, n) rounded to bfloat16, as uint8 (*, 2 n)."""
    return values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()


def _integers(quantized: QuantizedTensor, block: Block, where: str) -> np.ndarray:
    """Blocks (rows, bytes) of signed codes (Q4_0, Q5_0, Q8_0) or of codes with a minimum (Q4_1,
    Q5_1)."""
    rows, length = quantized.codes.shape
    count = length // block.size
    step = _per_block(effective_step(quantized.parameters, quantized.scheme), rows, count)
    parts = [_float16(step, where)]
    if quantized.zero_point is not None:
        parts.append(_float16(-_per_block(quantized.zero_point.float(), rows, count) * step, where))
    codes = quantized.codes.numpy().reshape(rows, count, block.size)
    if block.name == "Q8_0":
        parts.append(codes.view(np.uint8))
    else:
        unsigned = (codes.astype(np.int16) + block.offset).astype(np.uint8)
        if block.bits == 5:
            parts.append(np.packbits(unsigned >> 4, axis=-1, bitorder="little"))
        parts.append(_nibbles(unsigned & 15))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _mxfp4(quantized: QuantizedTensor) -> np.ndarray:
    rows, length = quantized.codes.shape
    count = length // BLOCKS["MXFP4"].size
    exponents = _per_block(quantized.scale, rows, count).numpy()[..., None]
    return np.concatenate([exponents, _nibbles(quantized.codes.numpy().reshape(rows, count, -1))], -1).reshape(rows, -1)


def _nvfp4(quantized: QuantizedTensor) -> np.ndarray:
    rows, length = quantized.codes.shape
    count = length // BLOCKS["NVFP4"].size
    scales = _per_block(quantized.scale, rows, 4 * count).numpy().reshape(rows, count, 4)
    codes = _nibbles(quantized.codes.numpy().reshape(rows, count, 4, 16)).reshape(rows, count, 32)
    return np.concatenate([scales, codes], -1).reshape(rows, -1)


def _per_block(parameter: Tensor, rows: int, count: int) -> Tensor:
    """A parameter (rows or 1, groups) as (rows, count): that of each block; bytes of one-byte dtypes
    as they are."""
    if parameter.dtype.itemsize == 1:
        parameter = parameter.view(torch.uint8)
    groups = parameter.shape[-1]
    return parameter.expand(rows, groups).repeat_interleave(count // groups, -1)


def _float16(values: Tensor, where: str) -> np.ndarray:
    """``values`` (rows, count) in float16 as uint8 (rows, count, 2)."""
    if values.numel() and float(values.abs().amax()) > _HALF_MAXIMUM:
        raise ConfigError(f"{where}: a step or minimum of {float(values.abs().amax()):.4g}; float16 holds up to 65504")
    return values.to(torch.float16).numpy().view(np.uint8).reshape(*values.shape, 2)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes (..., n) of four bits as (..., n/2): the first half in the low nibbles, the second in
    the high ones."""
    low, high = np.split(codes.view(np.uint8), 2, axis=-1)
    return low | (high << 4)
