"""Tables of number formats of elements and scales: the value of every code.

Float formats ``eXmY`` follow the OCP Microscaling (MX) v1.0 and OCP 8-bit floating point (OFP8)
specifications: ``e4m3`` is the ``fn`` kind (no infinity, one NaN per sign, maximum 448), ``e5m2``
is IEEE-like (maximum 57344), the formats of four and six bits have neither infinity nor NaN.
``ueXmY`` use the sign bit for the magnitude: every code is positive and finite. ``nf4`` is the
NormalFloat codebook of QLoRA (arXiv 2305.14314), ``kmeansB`` a codebook of 2**B entries fitted to
each scale block. ``e8m0`` is a power of two. Standard library only: this module is imported when
the grid is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ground.errors import ConfigError

_LARGEST_TABLE_BITS = 16
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NumberFormat:
    """Number format of at most 32 bits.

    ``kind`` is ``integer`` (two's complement), ``float`` (sign if ``signed``, exponent, mantissa),
    ``exponent`` (exponent only), ``codebook`` (``table``) or ``kmeans`` (a codebook within [-1, 1],
    stored with every block). ``specials`` are the special values of a float: ``none``, ``nan`` (the
    code of all ones) or ``ieee`` (the whole top exponent).
    """

    name: str
    kind: str
    bits: int
    exponent_bits: int = 0
    mantissa_bits: int = 0
    specials: str = "none"
    table: tuple[float, ...] = ()
    signed: bool = True

    @property
    def bias(self) -> int:
        """Offset subtracted from the stored exponent."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def maximum(self) -> float:
        """Largest finite value."""
        if self.kind == "integer":
            return float(2 ** (self.bits - 1) - 1)
        if self.kind == "codebook":
            return max(self.table)
        if self.kind == "kmeans":
            return 1.0
        if self.kind == "exponent":
            return 2.0**self.bias
        top_exponent = 2**self.exponent_bits - 1 - (self.specials == "ieee") - self.bias
        top_mantissa = 2**self.mantissa_bits - 1 - (self.specials == "nan")
        return math.ldexp(1 + top_mantissa / 2**self.mantissa_bits, top_exponent)

    @property
    def minimum_normal(self) -> float:
        """Smallest positive value of full precision; below it the values of a float are evenly
        spaced."""
        if self.kind == "float":
            return 2.0 ** (1 - self.bias)
        return min(value for value in self.values() if value > 0)

    @property
    def minimum_positive(self) -> float:
        """Smallest positive value."""
        return math.ldexp(self.minimum_normal, -self.mantissa_bits) if self.kind == "float" else self.minimum_normal

    def values(self) -> tuple[float, ...]:
        """Value of every code, ordered by bit pattern (integers: two's complement).

        Raises:
            ConfigError: for a format of more than 16 bits, and for a codebook fitted to each block.
        """
        if self.kind == "kmeans":
            raise ConfigError(
                f"format '{self.name}' has no fixed values: its codebooks are stored with the quantized tensor"
            )
        if self.bits > _LARGEST_TABLE_BITS:
            raise ConfigError(
                f"format '{self.name}' has 2**{self.bits} codes: "
                f"values() lists formats of at most {_LARGEST_TABLE_BITS} bits"
            )
        if self.kind == "codebook":
            return self.table
        if self.kind == "integer":
            half = 2 ** (self.bits - 1)
            return tuple(float(code if code < half else code - 2 * half) for code in range(2 * half))
        if self.kind == "exponent":
            return tuple(2.0 ** (code - self.bias) for code in range(2**self.bits - 1)) + (math.nan,)
        positive = tuple(self._float_value(code) for code in range(2 ** (self.bits - self.signed)))
        return positive + tuple(-value for value in positive) if self.signed else positive

    def _float_value(self, code: int) -> float:
        """Value of a float code without its sign bit."""
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        top = 2**self.exponent_bits - 1
        if self.specials == "ieee" and exponent == top:
            return math.nan if mantissa else math.inf
        if self.specials == "nan" and exponent == top and mantissa == 2**self.mantissa_bits - 1:
            return math.nan
        if exponent == 0:
            return math.ldexp(mantissa, 1 - self.bias - self.mantissa_bits)
        return math.ldexp(2**self.mantissa_bits + mantissa, exponent - self.bias - self.mantissa_bits)


@dataclass(frozen=True)
class ElementFormat(NumberFormat):
    """Storage format of the elements of a quantized tensor."""


@dataclass(frozen=True)
class ScaleFormat(NumberFormat):
    """Storage format of scales; scales are never negative, a signed format keeps its sign bit 0.

    ``global_scale`` is ``never`` (the format covers every range), ``optional``, or ``needed``: the
    format is so narrow that a second, float32 scale has to centre it.
    """

    global_scale: str = "optional"


def _named(*formats: NumberFormat) -> dict:
    return {format.name: format for format in formats}


ELEMENT_FORMATS: dict[str, ElementFormat] = _named(
    *(ElementFormat(f"int{bits}", "integer", bits) for bits in range(2, 9)),
    ElementFormat("e2m1", "float", 4, 2, 1),
    ElementFormat("e2m3", "float", 6, 2, 3),
    ElementFormat("e3m2", "float", 6, 3, 2),
    ElementFormat("e4m3", "float", 8, 4, 3, "nan"),
    ElementFormat("e5m2", "float", 8, 5, 2, "ieee"),
    ElementFormat("ue2m2", "float", 4, 2, 2, signed=False),
    ElementFormat("ue3m1", "float", 4, 3, 1, signed=False),
    ElementFormat("nf4", "codebook", 4, table=_NF4),
    *(ElementFormat(f"kmeans{bits}", "kmeans", bits) for bits in (2, 3, 4)),
)

SCALE_FORMATS: dict[str, ScaleFormat] = _named(
    ScaleFormat("fp32", "float", 32, 8, 23, "ieee", global_scale="never"),
    ScaleFormat("fp16", "float", 16, 5, 10, "ieee"),
    ScaleFormat("bf16", "float", 16, 8, 7, "ieee", global_scale="never"),
    ScaleFormat("e8m0", "exponent", 8, 8, 0, "nan", global_scale="never"),
    ScaleFormat("e5m2", "float", 8, 5, 2, "ieee", global_scale="needed"),
    ScaleFormat("e4m3", "float", 8, 4, 3, "nan", global_scale="needed"),
    ScaleFormat("e3m2", "float", 6, 3, 2, global_scale="needed"),
    ScaleFormat("e2m3", "float", 6, 2, 3, global_scale="needed"),
    ScaleFormat("e2m1", "float", 4, 2, 1, global_scale="needed"),
    ScaleFormat("int4", "integer", 4, global_scale="needed"),
)
