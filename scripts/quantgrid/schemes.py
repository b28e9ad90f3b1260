"""Quantization schemes: how one tensor is quantized, as plain data, and the named presets of the grid.

A scheme = element format + scale format + granularity + symmetry + how the range of a scale block is found. What each
format means: docs/formats.md. Standard library only: the grid reads this module when it is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from .errors import ConfigError, unknown_name
from .formats import ELEMENT_FORMATS, SCALE_FORMATS, ElementFormat, ScaleFormat
from .presets import PRESETS
from .scheme_rules import check_scheme

FLOAT_BITS = 32  # of a global scale, and of the minimum that is the zero point of an unsigned float
CODEBOOK_BITS = 16  # of an entry of a fitted codebook: float16


@dataclass(frozen=True)
class QuantScheme:
    """How one tensor of shape (*batch, rows, n) is quantized; scale blocks run along its last dimension.

    element       name of an element format (``ELEMENT_FORMATS``)
    scale_format  name of the format that scales are stored in (``SCALE_FORMATS``)
    granularity   ``tensor``: one scale per matrix (the last two dimensions); ``channel`` (of an activation also called ``token``):
                  one per row; ``group``: one per ``group_size`` consecutive elements of a row
    symmetric     False stores a zero point per scale: an unsigned code of asymmetric integers, which have them or not; of unsigned
                  floats, which always have one, the block's minimum itself in float32
    qmax          symmetric integers: the code that the block's maximum maps to, 2**(bits-1)-1 (the default) or half a step more
    scale_rule    ``nearest``; of e8m0 ``floor`` (OCP), ``even``, ``rceil`` or ``four_thirds`` (see ``scales.py``)
    global_scale  a float32 scale on top: ``none``, per ``tensor``, per ``token`` (row), or ``static`` (given from outside)
    range         ``minmax``; ``mse``: both ends shrunk by the best p of {1 - i/mse_steps, i < mse_grid*mse_steps}, minimizing the
                  block's sum of |x - quantized x|**mse_norm, or the smallest scale that covers the block; ``exhaustive``: the best
                  in this measure of all scales that a format of at most 8 bits can represent; ``percentile``: the
                  nearest-rank percentile of the block
    clip_ratio    constant factor on both ends of the range
    seed          of the k-means codebooks, one per scale block, stored in float16

    Raises ``ConfigError`` for unknown names and for fields that contradict one another.
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

    def __post_init__(self):
        if self.granularity == "token":
            object.__setattr__(self, "granularity", "channel")
        self.validate()

    def validate(self) -> None:
        """Refuse unknown names and contradictions with a ``ConfigError`` that says what would be accepted."""
        check_scheme(self)

    @property
    def element_format(self) -> ElementFormat:
        return ELEMENT_FORMATS[self.element]

    @property
    def storage(self) -> ScaleFormat:
        """The format that scales are stored in."""
        return SCALE_FORMATS[self.scale_format]

    @property
    def limit(self) -> float:
        """The quantized magnitude that the end of a block's range maps to (asymmetric: the number of steps in the range)."""
        if not self.symmetric and self.element_format.kind == "integer":
            return float(2**self.element_format.bits - 1)
        return self.element_format.maximum if self.qmax is None else self.qmax

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code: signed of symmetric integers, unsigned of all others."""
        bits = self.element_format.bits
        signed = self.symmetric and self.element_format.kind == "integer"
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)

    @property
    def zero_point_bits(self) -> int:
        """Stored bits of a zero point, 0 where there is none."""
        if self.symmetric:
            return 0
        return self.element_format.bits if self.element_format.kind == "integer" else FLOAT_BITS

    @property
    def codebook_bits(self) -> int:
        """Stored bits of the codebook of one scale block, 0 where the element format has its values."""
        return CODEBOOK_BITS * 2**self.element_format.bits if self.element_format.kind == "kmeans" else 0

    @property
    def scale_multiplier(self) -> float:
        """A constant factor of every scale that is not stored: 1/3 under ``four_thirds``, whose e8m0 scales are 4/3 powers of two."""
        return 1 / 3 if self.scale_rule == "four_thirds" else 1.0

    @property
    def rows_are_independent(self) -> bool:
        """Whether the quantization of a row depends on that row alone."""
        return self.granularity != "tensor" and self.global_scale in ("none", "token")

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (*batch, rows, groups) of the scales of a tensor of ``shape`` (one dimension: one row).

        Raises ``ConfigError`` where ``group_size`` does not divide the last dimension, with the sizes that do.
        """
        if not shape:
            raise ConfigError("a scalar cannot be quantized: the last dimension holds the scale blocks")
        *batch, rows, length = shape if len(shape) > 1 else (1, *shape)
        if self.granularity != "group":
            return (*batch, 1 if self.granularity == "tensor" else rows, 1)
        if length % self.group_size:
            divisors = ", ".join(str(d) for d in range(2, length + 1) if length % d == 0)
            raise ConfigError(f"group_size {self.group_size} does not divide the last dimension {length}; these do: {divisors}")
        return (*batch, rows, length // self.group_size)

    def global_scale_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Shape of the global scales of a tensor of ``shape``, (*batch, rows or 1, 1); None without a global scale."""
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
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> QuantScheme:
        """The scheme of ``to_dict``'s mapping; ``ConfigError`` names an unknown field."""
        accepted = [field.name for field in fields(cls)]
        for name in values:
            if name not in accepted:
                raise ConfigError(unknown_name("field of a quantization scheme", name, accepted))
        if "element" not in values:
            raise ConfigError("a quantization scheme needs the field 'element'")
        return cls(**values)


def scheme(name: str, **overrides) -> QuantScheme:
    """The weight scheme of the preset ``name`` with fields overridden.

    ``granularity="group-64"`` and ``group_size=64`` each mean groups of 64. An overridden ``scale_format`` brings its own
    ``scale_rule`` and ``global_scale`` along (e8m0: the floor rule and none; the narrow formats: nearest and one per tensor, of an
    activation one per token), an overridden element its symmetry (unsigned floats are asymmetric), unless these are overridden too.

    Raises:
        ConfigError: for an unknown preset or field, for a contradiction, and for a preset that leaves weights unquantized.
    """
    fields_of_preset = _fields_of(name, "weight")
    if fields_of_preset is None:
        raise ConfigError(f"format '{name}' leaves weights in full precision: it has no weight scheme")
    return QuantScheme.from_dict(_override(fields_of_preset, overrides, "tensor"))


def activation_scheme(name: str, **overrides) -> QuantScheme | None:
    """The activation scheme of the preset ``name`` with fields overridden as in ``scheme``; None: activations stay in full precision."""
    fields_of_preset = _fields_of(name, "activation")
    if fields_of_preset is None:
        return None
    found = QuantScheme.from_dict(_override(fields_of_preset, overrides, "token"))
    if found.element_format.kind == "kmeans":
        raise ConfigError(f"element '{found.element}' is for weights alone: its codebooks would be fitted to every activation")
    return found


def _fields_of(name: str, tensor: str) -> dict | None:
    if name not in PRESETS:
        raise ConfigError(unknown_name("format", name, PRESETS))
    return PRESETS[name][tensor]


def _override(preset: dict, overrides: dict, global_scale: str) -> dict:
    """The preset's fields under ``overrides``, with what follows from an overridden granularity, element or scale format."""
    merged = preset | _spell_out_groups(overrides)
    if merged.get("granularity", "channel") != "group" and "group_size" not in overrides:
        merged.pop("group_size", None)
    element = ELEMENT_FORMATS.get(overrides.get("element"))
    if element is not None and "symmetric" not in overrides and not element.signed:
        merged["symmetric"] = False
    if "scale_format" in overrides and overrides["scale_format"] != preset.get("scale_format", "fp32"):
        storage = SCALE_FORMATS.get(overrides["scale_format"])
        if storage is not None:
            consequences = {"scale_rule": "floor" if storage.kind == "exponent" else "nearest"}
            if storage.global_scale == "never":
                consequences["global_scale"] = "none"
            elif storage.global_scale == "needed" and preset.get("global_scale", "none") == "none":
                consequences["global_scale"] = global_scale
            merged |= {field: value for field, value in consequences.items() if field not in overrides}
    return merged


def _spell_out_groups(overrides: dict) -> dict:
    """``group-64`` and a ``group_size`` alone, spelt out as granularity and group size."""
    spelt, granularity, group_size = dict(overrides), overrides.get("granularity"), overrides.get("group_size")
    named = re.fullmatch(r"group-([0-9]{1,9})", granularity) if isinstance(granularity, str) else None
    if named:
        if group_size not in (None, int(named[1])):
            raise ConfigError(f"granularity '{granularity}' contradicts group_size {group_size}")
        spelt |= {"granularity": "group", "group_size": int(named[1])}
    elif group_size is not None and granularity is None:
        spelt["granularity"] = "group"
    return spelt
