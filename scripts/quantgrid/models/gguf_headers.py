"""Bounds checks of a GGUF file, before a library that trusts its counts and lengths reads it.

The layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3,
little-endian. Every count, length, size and offset has to fit in the file; the numbers of keys,
tensors and array elements are limited.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path

from ..ground.errors import ConfigError

KEYS, TENSORS, ELEMENTS = 10_000, 100_000, 1 << 24  # accepted maxima; elements: of one array
# type of a value -> bytes
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_TEXT = 1 << 24  # bytes


class _Cursor:
    """Read position in the bytes of a file; reading beyond the end raises ``struct.error``."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at = content, 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self.content, self.at)
        self.at += struct.calcsize(kind)
        return value

    def bounded(self, kind: str, largest: int, what: str) -> int:
        if (value := self.number(kind)) > largest:
            raise ValueError(f"{value} {what}, at most {largest}")
        return value

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.content):
            raise ValueError("a value reaches beyond the end of the file")

    def text(self) -> bytes:
        length = self.bounded("Q", _TEXT, "bytes in a text")
        begin = self.at
        self.skip(length)
        return self.content[begin : self.at]

    def value(self, kind: int) -> None:
        """Skip one value of a key."""
        if kind in _SCALARS:
            self.skip(_SCALARS[kind])
        elif kind == _STRING:
            self.skip(self.bounded("Q", _TEXT, "bytes in a text"))
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.bounded("Q", ELEMENTS, "elements in an array")
            if inner in _SCALARS:
                self.skip(_SCALARS[inner] * count)
            elif inner == _STRING:
                for _ in range(count):
                    self.value(_STRING)
            else:
                raise ValueError(f"an array of values of type {inner}")
        else:
            raise ValueError(f"a value of unknown type {kind}")


def check_gguf(path: Path, where: str = "model") -> list[str]:
    """Element types of the tensors of the GGUF file ``path``, such as Q4_1; :class:`ConfigError` if
    a count, length or offset does not fit."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _check(_Cursor(content), len(content))
    except (ValueError, struct.error, OverflowError) as error:
        raise ConfigError(f"{where}.file: {path.name} is not a complete GGUF file ({error})") from None


def _check(cursor: _Cursor, size: int) -> list[str]:
    if cursor.content[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    cursor.skip(4)
    if (version := cursor.number("I")) not in (2, 3):
        raise ValueError(f"version {version}; 2 and 3 are accepted")
    tensors, keys = cursor.bounded("Q", TENSORS, "tensors"), cursor.bounded("Q", KEYS, "keys")
    for _ in range(keys):
        cursor.text()
        cursor.value(cursor.number("I"))
    found = [_tensor(cursor) for _ in range(tensors)]
    if cursor.at + max((end for _, end in found), default=0) > size:
        raise ValueError("a tensor reaches beyond the end of the file")
    return [kind for kind, _ in found]


def _tensor(cursor: _Cursor) -> tuple[str, int]:
    """Element type of a tensor, and its end offset in the data section."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    cursor.text()
    sizes = [
        cursor.bounded("Q", 1 << 32, "entries of a tensor's dimension")
        for _ in range(cursor.bounded("I", 4, "dimensions of a tensor"))
    ]
    kind = GGMLQuantizationType(cursor.number("I"))
    offset = cursor.bounded("Q", len(cursor.content), "as the offset of a tensor")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return kind.name, offset + prod(sizes) // block * block_bytes
