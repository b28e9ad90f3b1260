"""Validation of quantization schemes: accepted values of their fields, and contradictions. Standard library only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..ground.errors import ConfigError, shown, text_hint, unknown_name
from .number_formats import ELEMENT_FORMATS, SCALE_FORMATS

if TYPE_CHECKING:
    from .quant_scheme import QuantScheme

GRANULARITIES = ("tensor", "channel", "group")
E8M0_RULES = ("floor", "even", "rceil", "four_thirds")
GLOBAL_SCALES = ("none", "tensor", "token", "static", "site")
RANGES = ("minmax", "mse", "exhaustive", "four_six", "percentile")
LARGEST, MOST_STEPS, LARGEST_SEED = 10**9, 10_000, 2**63 - 1
_LARGEST_SEARCHED_BITS = 8
_LARGEST_TRIM = 0.5
_SEARCH_OPTIONS = ("mse_norm", "mse_steps", "mse_grid")  # trim_low and trim_high are those of ``mse`` alone


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
        if not _is_number(value) or not low < value <= high or value == math.inf:
            raise ConfigError(
                f"{field} is {shown(value)}: a number above {low} and at most {high} is accepted{text_hint(value)}"
            )
    for field in ("trim_low", "trim_high"):
        value = getattr(scheme, field)
        if not _is_number(value) or not 0 <= value < _LARGEST_TRIM:
            raise ConfigError(
                f"{field} is {shown(value)}: a number of at least 0 and below {_LARGEST_TRIM} is accepted"
                f"{text_hint(value)}"
            )
    for field, low, high in (("mse_steps", 1, MOST_STEPS), ("seed", 0, LARGEST_SEED)):
        value = getattr(scheme, field)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(
                f"{field} is {shown(value)}: an integer of at least {low} and at most {high} is accepted"
                f"{text_hint(value)}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
    if scheme.range != "mse" and (scheme.trim_low or scheme.trim_high):
        raise ConfigError(f"trim_low and trim_high contradict range '{scheme.range}': 'mse' sums errors without them")
    if scheme.range == "four_six":
        if (scheme.element, scheme.scale_format) != ("e2m1", "e4m3") or scheme.global_scale == "none":
            raise ConfigError(
                f"range 'four_six' contradicts element '{scheme.element}' with scale_format '{scheme.scale_format}' "
                f"and global_scale '{scheme.global_scale}': it is defined for 'e2m1' with 'e4m3' and a global scale"
            )
        if scheme.clip_ratio != 1:
            raise ConfigError("clip_ratio contradicts range 'four_six', which tries two scales")
        for field in _SEARCH_OPTIONS:
            given, default = getattr(scheme, field), getattr(type(scheme), field)
            if given != default:
                raise ConfigError(
                    f"{field} {shown(given)} contradicts range 'four_six', which compares the squared errors of two "
                    f"scales: leave {field} out"
                )
    if element.kind == "kmeans" and (scheme.range != "minmax" or scheme.clip_ratio != 1):
        raise ConfigError(
            f"element '{scheme.element}' accepts only range 'minmax' and clip_ratio 1: "
            "its codebook is fitted to the values"
        )
