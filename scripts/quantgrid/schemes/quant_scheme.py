"""Quantization schemes: plain data that describes the rounding of one tensor, and its validation.

A scheme = element format + scale format + granularity + symmetry + range of a scale block. Formats
are described in docs/formats.md. Standard library only: this module is imported when the grid is
built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

from ..ground.errors import ConfigError, shown, text_hint, unknown_name
from .number_formats import ELEMENT_FORMATS, SCALE_FORMATS, ElementFormat, ScaleFormat

# bits of a global scale, and of the minimum that is the zero point of an unsigned float
FLOAT_BITS = 32
CODEBOOK_BITS = 16  # bits of an entry of a fitted codebook: float16
GRANULARITIES = ("tensor", "channel", "group")
E8M0_RULES = ("floor", "even", "rceil", "four_thirds")
GLOBAL_SCALES = ("none", "tensor", "token", "static", "site")
RANGES = ("minmax", "mse", "exhaustive", "percentile")
LARGEST, MOST_STEPS, LARGEST_SEED = 10**9, 10_000, 2**63 - 1
_LARGEST_SEARCHED_BITS = 8


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
                  measure of all scales in a format of at most 8 bits; ``percentile``: the
                  nearest-rank percentile of the block
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


def check_scheme(scheme: QuantScheme) -> None:
    """Raise ``ConfigError`` for the first error in ``scheme``."""
    _check_names(scheme)
    _check_numbers(scheme)
    _check_element(scheme)
    _check_scale(scheme)
    _check_range(scheme)


def _check_names(scheme: QuantScheme) -> None:
    for field, accepted in (
        ("element", ELEMENT_FORMATS),
        ("scale_format", SCALE_FORMATS),
        ("granularity", GRANULARITIES),
        ("scale_rule", ("nearest", *E8M0_RULES)),
        ("global_scale", GLOBAL_SCALES),
        ("range", RANGES),
    ):
        if getattr(scheme, field) not in accepted:
            raise ConfigError(unknown_name(field, getattr(scheme, field), accepted))


def _check_numbers(scheme: QuantScheme) -> None:
    group_size, bits = scheme.group_size, scheme.element_format.bits
    if group_size is not None and (
        isinstance(group_size, bool) or not isinstance(group_size, int) or not 1 <= group_size <= LARGEST
    ):
        raise ConfigError(
            f"group_size is {shown(group_size)}: a positive integer of at most {LARGEST} is accepted"
            f"{text_hint(group_size)}"
        )
    if not isinstance(scheme.symmetric, bool):
        raise ConfigError(f"symmetric is {shown(scheme.symmetric)}: true or false is accepted")
    default = 2 ** (bits - 1) - 1
    if scheme.qmax is not None and scheme.qmax not in (default, default + 0.5):
        raise ConfigError(f"qmax is {shown(scheme.qmax)}: '{scheme.element}' accepts {default} or {default + 0.5}")
    for field, low, high in (
        ("clip_ratio", 0, 1),
        ("percentile", 0, 100),
        ("mse_grid", 0, 1),
        ("mse_norm", 0, math.inf),
    ):
        value = getattr(scheme, field)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low < value <= high
            or value == math.inf
        ):
            raise ConfigError(
                f"{field} is {shown(value)}: a number above {low} and at most {high} is accepted{text_hint(value)}"
            )
    for field, low, high in (("mse_steps", 1, MOST_STEPS), ("seed", 0, LARGEST_SEED)):
        value = getattr(scheme, field)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(
                f"{field} is {shown(value)}: an integer of at least {low} and at most {high} is accepted"
                f"{text_hint(value)}"
            )


def _check_element(scheme: QuantScheme) -> None:
    if scheme.granularity == "group" and scheme.group_size is None:
        raise ConfigError("granularity 'group' needs a group_size")
    if scheme.granularity != "group" and scheme.group_size is not None:
        raise ConfigError(
            f"group_size {scheme.group_size} contradicts granularity '{scheme.granularity}': only 'group' accepts one"
        )
    element = scheme.element_format
    if not scheme.symmetric and element.kind != "integer" and element.signed:
        raise ConfigError(
            f"element '{scheme.element}' is a signed float or a codebook: asymmetric quantization is defined for "
            "int2..int8 and for unsigned floats (ue2m2, ue3m1)"
        )
    if scheme.symmetric and not element.signed:
        raise ConfigError(f"element '{scheme.element}' has no negative values: it needs a zero point, symmetric: false")
    if scheme.qmax is not None and not (element.kind == "integer" and scheme.symmetric):
        raise ConfigError("qmax is accepted for symmetric integers only")


def _check_scale(scheme: QuantScheme) -> None:
    rules = E8M0_RULES if scheme.scale_format == "e8m0" else ("nearest",)
    if scheme.scale_rule not in rules:
        raise ConfigError(
            f"scale_rule '{scheme.scale_rule}' contradicts scale_format '{scheme.scale_format}', which accepts: "
            f"{', '.join(rules)}"
        )
    if scheme.global_scale != "none" and scheme.storage.global_scale == "never":
        raise ConfigError(f"scale_format '{scheme.scale_format}' accepts no global_scale: it covers every range")


def _check_range(scheme: QuantScheme) -> None:
    element, narrow = scheme.element_format, scheme.storage.bits <= _LARGEST_SEARCHED_BITS
    if scheme.range == "exhaustive" and not (element.kind == "float" and scheme.symmetric and narrow):
        fitting = ", ".join(name for name, storage in SCALE_FORMATS.items() if storage.bits <= _LARGEST_SEARCHED_BITS)
        raise ConfigError(
            f"range 'exhaustive' contradicts element '{scheme.element}' with scale_format '{scheme.scale_format}': it "
            f"is defined for signed float elements with scales of at most {_LARGEST_SEARCHED_BITS} bits ({fitting})"
        )
    if scheme.range == "exhaustive" and scheme.clip_ratio != 1:
        raise ConfigError("clip_ratio contradicts range 'exhaustive', which tries every scale")
    if element.kind == "kmeans" and (scheme.range != "minmax" or scheme.clip_ratio != 1):
        raise ConfigError(
            f"element '{scheme.element}' accepts only range 'minmax' and clip_ratio 1: "
            "its codebook is fitted to the values"
        )
