"""Lossless packing of codes of 2 to 8 bits into bytes.

The codes of a row follow one another from the lowest bit of its first byte upward, so 4-bit codes
are two to a byte, low nibble first (as in the OCP MX and NVFP4 checkpoints). Each row is padded
with zero bits to whole bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ground.errors import ConfigError


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer ``codes`` (..., n) into uint8 (..., ceil(n * bits / 8)).

    Negative codes are stored in two's complement.

    Raises:
        ConfigError: for ``bits`` outside 2..8, a dtype other than int8 and uint8, or a code that
        does not fit in ``bits``.
    """
    per_word, word_bytes = _word(bits)
    if codes.dtype not in (torch.int8, torch.uint8):
        raise ConfigError(f"codes are {codes.dtype}: int8 and uint8 are accepted")
    signed = codes.dtype == torch.int8
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ConfigError(
            f"codes reach from {int(codes.min())} to {int(codes.max())}: {bits} bits hold {low} to {high}"
        )
    length = codes.shape[-1]
    patterns = codes.view(torch.uint8) & (2**bits - 1)
    if per_word == 1:
        return patterns.contiguous()
    patterns = pad(patterns, (0, -length % per_word)).unflatten(-1, (-1, per_word))
    words = torch.zeros(patterns.shape[:-1], dtype=torch.int64 if word_bytes > 1 else torch.uint8, device=codes.device)
    for position in range(per_word):
        words |= patterns[..., position].to(words.dtype) << (position * bits)
    packed = (
        words
        if word_bytes == 1
        else torch.stack([(words >> (8 * byte)) & 255 for byte in range(word_bytes)], -1).flatten(-2)
    )
    return packed[..., : packed_length(length, bits)].to(torch.uint8).contiguous()


def unpack(packed: Tensor, bits: int, shape: Sequence[int], signed: bool) -> Tensor:
    """Unpack the output of ``pack`` to codes of ``shape``: int8 if ``signed``, else uint8.

    Raises:
        ConfigError: for ``bits`` outside 2..8, or if dtype or shape of ``packed`` does not match
        ``pack`` of codes of ``shape``.
    """
    per_word, word_bytes = _word(bits)
    shape = tuple(shape)
    expected = (*shape[:-1], packed_length(shape[-1], bits))
    if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
        raise ConfigError(
            f"packed codes are {packed.dtype} of shape {tuple(packed.shape)}: {bits}-bit codes of shape {shape} "
            f"are torch.uint8 of shape {expected}"
        )
    words = packed
    if word_bytes > 1:
        grouped = pad(packed, (0, -packed.shape[-1] % word_bytes)).unflatten(-1, (-1, word_bytes)).to(torch.int64)
        words = sum(grouped[..., byte] << (8 * byte) for byte in range(word_bytes))
    codes = torch.stack([(words >> (position * bits)) & (2**bits - 1) for position in range(per_word)], -1).flatten(-2)[
        ..., : shape[-1]
    ]
    if not signed:
        return codes.to(torch.uint8).contiguous()
    sign = 2 ** (bits - 1)
    return ((codes.to(torch.int16) ^ sign) - sign).to(torch.int8)


def packed_length(length: int, bits: int) -> int:
    """Bytes of a packed row of ``length`` codes."""
    return math.ceil(length * bits / 8)


def _word(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest group of codes in whole bytes: 4-bit codes (2, 1), 3-bit
    (8, 3)."""
    if bits not in range(2, 9):
        raise ConfigError(f"bits is {bits!r}: 2 to 8 are accepted")
    common = math.lcm(bits, 8)
    return common // bits, common // 8
