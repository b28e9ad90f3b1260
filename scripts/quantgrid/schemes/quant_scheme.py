"""Quantization schemes: plain data that describes the rounding of one tensor.

A scheme = element format + scale format + granularity + symmetry + range of a scale block. Formats
are described in docs/reference/formats.md. Standard library only: this module is imported when the grid is
built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

from ..ground.errors import ConfigError, unknown_name
from .number_formats import ELEMENT_FORMATS, SCALE_FORMATS, ElementFormat, ScaleFormat
from .scheme_checks import check_scheme

# bits of a global scale, and of the minimum that is the zero point of an unsigned float
FLOAT_BITS = 32
CODEBOOK_BITS = 16  # bits of an entry of a fitted codebook: float16
_FOUR_SIX_SCALE = 256.0  # the largest scale under ``four_six``: 1.5 times it still fits E4M3 (arXiv 2512.02010)


@dataclass(frozen=True)
class QuantScheme:
    """Quantization scheme of a tensor (*batch, rows, n); scale blocks run along the last dimension.

    element       name of an element format (``ELEMENT_FORMATS``)
    scale_format  name of the storage format of scales (``SCALE_FORMATS``)
    granularity   ``tensor``: one scale per matrix (the last two dimensions); ``channel`` (for an
                  activation also called ``token``): one per row; ``group``: one per
                  ``group_size`` consecutive elements of a row
    symmetric     False stores a zero point per scale: an unsigned code for asymmetric integers,
                  which may be symmetric or not; the minimum of the block in float32 for unsigned
                  floats, which are always asymmetric
    qmax          symmetric integers: the code of the maximum of the block, 2**(bits-1)-1 (the
                  default) or half a step more
    scale_rule    ``nearest``; for e8m0 ``floor`` (OCP), ``even``, ``rceil`` or ``four_thirds``
                  (see ``scales.py``)
    global_scale  an additional float32 scale: ``none``, per ``tensor``, per ``token`` (row),
                  ``static`` (given by the caller), or ``site`` (of weights, given by the caller:
                  the largest of the linears that share an input)
    range         ``minmax``; ``mse``: both ends times the best p of {1 - i/mse_steps, i <
                  mse_grid*mse_steps}, minimizing the block's sum of |x - quantized x|**mse_norm,
                  or the smallest scale that covers the block; ``exhaustive``: the best by this
                  measure of all scales in a format of at most 8 bits; ``four_six``: the largest
                  element becomes 6, or 4 where that has the smaller squared error (e2m1 with
                  e4m3 scales); ``percentile``: the nearest-rank percentile of the block
    trim_low, trim_high  shares of the smallest and of the largest errors of a block that ``mse`` leaves
                  out of its sum, rounded down to whole elements
    clip_ratio    constant factor on both ends of the range
    seed          of the k-means codebooks, one per scale block, stored in float16

    Raises ``ConfigError`` for unknown names and for contradictory fields.
    """

    element: str
    scale_format: str = "fp32"
    granularity: str = "channel"
    group_size: int | None = None
    symmetric: bool = True
    qmax: float | None = None
    scale_rule: str = "nearest"
    global_scale: str = "none"
    range: str = "minmax"
    clip_ratio: float = 1.0
    percentile: float = 99.9
    mse_norm: float = 2.4
    mse_steps: int = 100
    mse_grid: float = 0.8
    trim_low: float = 0.0
    trim_high: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.granularity == "token":
            object.__setattr__(self, "granularity", "channel")
        self.validate()

    def validate(self) -> None:
        """Raise a ``ConfigError`` that lists the accepted values for unknown names and
        contradictions."""
        check_scheme(self)

    @property
    def element_format(self) -> ElementFormat:
        return ELEMENT_FORMATS[self.element]

    @property
    def storage(self) -> ScaleFormat:
        """Storage format of the scales."""
        return SCALE_FORMATS[self.scale_format]

    @property
    def limit(self) -> float:
        """Quantized magnitude of the end of a block's range (asymmetric: number of steps in the
        range)."""
        if not self.symmetric and self.element_format.kind == "integer":
            return float(2**self.element_format.bits - 1)
        return self.element_format.maximum if self.qmax is None else self.qmax

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code: signed for symmetric integers, unsigned for all others."""
        bits = self.element_format.bits
        signed = self.symmetric and self.element_format.kind == "integer"
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)

    @property
    def zero_point_bits(self) -> int:
        """Stored bits of a zero point, 0 without one."""
        if self.symmetric:
            return 0
        return self.element_format.bits if self.element_format.kind == "integer" else FLOAT_BITS

    @property
    def codebook_bits(self) -> int:
        """Stored bits of the codebook of one scale block, 0 for an element format with fixed
        values."""
        return CODEBOOK_BITS * 2**self.element_format.bits if self.element_format.kind == "kmeans" else 0

    @property
    def scale_multiplier(self) -> float:
        """Constant factor of every scale that is not stored.

        It is 1/3 under ``four_thirds``, whose e8m0 scales are 4/3 powers of two.
        """
        return 1 / 3 if self.scale_rule == "four_thirds" else 1.0

    @property
    def largest_scale(self) -> float:
        """Stored scale of the block with the largest magnitude under one global scale."""
        return _FOUR_SIX_SCALE if self.range == "four_six" else self.storage.maximum

    @property
    def rows_are_independent(self) -> bool:
        """Check whether the quantization of a row depends on that row only."""
        return self.granularity != "tensor" and self.global_scale in ("none", "token")

    @property
    def separate(self) -> QuantScheme:
        """This scheme for one linear alone: a global scale per tensor instead of per site."""
        return replace(self, global_scale="tensor") if self.global_scale == "site" else self

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (*batch, rows, groups) of the scales of a tensor of ``shape``; one dimension is one
        row.

        Raises ``ConfigError``, with the accepted sizes, if ``group_size`` does not divide the last
        dimension.
        """
        if not shape:
            raise ConfigError("a scalar cannot be quantized: a tensor of at least one dimension is accepted")
        *batch, rows, length = shape if len(shape) > 1 else (1, *shape)
        if self.granularity != "group":
            return (*batch, 1 if self.granularity == "tensor" else rows, 1)
        if length % self.group_size:  # type: ignore[operator]
            divisors = ", ".join(str(d) for d in range(2, length + 1) if length % d == 0)
            raise ConfigError(
                f"group_size {self.group_size} does not divide the last dimension {length}; accepted: {divisors}"
            )
        return (*batch, rows, length // self.group_size)  # type: ignore[operator]

    def global_scale_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Shape (*batch, rows or 1, 1) of the global scales of a tensor of ``shape``; None without
        one."""
        if self.global_scale == "none":
            return None
        *batch, rows, _ = shape if len(shape) > 1 else (1, *shape)
        return (*batch, rows if self.global_scale == "token" else 1, 1)

    def bits_per_element(self, shape: Sequence[int]) -> float:
        """Stored bits per element of a tensor of ``shape``: codes and parameters."""
        elements = math.prod(shape)
        if not elements:
            return 0.0
        per_scale = self.storage.bits + self.zero_point_bits + self.codebook_bits
        bits = elements * self.element_format.bits + math.prod(self.scale_shape(shape)) * per_scale
        shape_of_global = self.global_scale_shape(shape)
        return (bits + (FLOAT_BITS * math.prod(shape_of_global) if shape_of_global else 0)) / elements

    def to_dict(self) -> dict:
        """All fields as a dict, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> QuantScheme:
        """Parse the output of ``to_dict``; a ``ConfigError`` names an unknown field."""
        accepted = [field.name for field in fields(cls)]
        for name in values:
            if name not in accepted:
                raise ConfigError(unknown_name("field of a quantization scheme", name, accepted))
        if "element" not in values:
            raise ConfigError("a quantization scheme needs the field 'element'")
        return cls(**values)
