"""Codes packed into int32 words, as compressed-tensors, GPTQ and AWQ store them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..quantizer.packing import pack
from ..quantizer.tensors import QuantizedTensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output that nibble i of a word holds


def words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned ``codes`` (..., n) uint8 -> int32 (..., ceil(n bits / 32)).

    Code i takes bits i * bits and up of its row, low bits first, across the ends of words.
    """
    packed = pack(codes, bits)
    packed = pad(packed, (0, -packed.shape[-1] % 4))
    return packed.flatten().view(torch.int32).unflatten(0, (*packed.shape[:-1], -1))


def words_down(codes: Tensor, bits: int) -> Tensor:
    """Unsigned ``codes`` (n, m) uint8 -> int32 (ceil(n bits / 32), m): :func:`words` of every
    column."""
    return words(codes.T.contiguous(), bits).T.contiguous()


def awq_words(codes: Tensor) -> Tensor:
    """Unsigned 4-bit ``codes`` (..., n) uint8, n a multiple of 8 -> int32 (..., n / 8) in AWQ's order."""
    return words(codes.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2), 4)


def unsigned_codes(quantized: QuantizedTensor) -> Tensor:
    """Codes of integers from 0 to 2**bits - 1, uint8: symmetric ones plus 2**(bits - 1)."""
    if not quantized.scheme.symmetric:
        return quantized.codes
    return (quantized.codes.to(torch.int16) + 2 ** (quantized.scheme.element_format.bits - 1)).to(torch.uint8)


def signed_codes(codes: Tensor, bits: int) -> Tensor:
    """Unsigned ``codes`` minus 2**(bits - 1), int8."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
