"""Schemes by preset name, with overridden fields. Standard library only."""

from __future__ import annotations

from ..ground.errors import ConfigError, unknown_name
from .granularity import Granularity
from .number_formats import ELEMENT_FORMATS, SCALE_FORMATS
from .presets import PRESETS
from .quant_scheme import QuantScheme


def scheme(name: str, **overrides: object) -> QuantScheme:
    """Weight scheme of the preset ``name`` with fields overridden.

    ``granularity="group-64"`` and ``group_size=64`` are equivalent. An overridden ``scale_format``
    implies a ``scale_rule`` and ``global_scale`` (e8m0: the floor rule and none; the narrow
    formats: nearest and one per tensor, for an activation one per token), an overridden element
    implies its symmetry (unsigned floats are asymmetric), unless these are overridden too.

    Raises:
        ConfigError: for an unknown preset or field, for a contradiction, and for a preset that
        leaves weights unquantized.
    """
    fields_of_preset = _fields_of(name, "weight")
    if fields_of_preset is None:
        raise ConfigError(f"format '{name}' has no weight scheme: it leaves weights in full precision")
    return QuantScheme.from_dict(_override(fields_of_preset, overrides, "tensor"))


def activation_scheme(name: str, **overrides: object) -> QuantScheme | None:
    """Activation scheme of the preset ``name``, overridden as in ``scheme``; None: full
    precision."""
    fields_of_preset = _fields_of(name, "activation")
    if fields_of_preset is None:
        return None
    found = QuantScheme.from_dict(_override(fields_of_preset, overrides, "token"))
    if found.element_format.kind == "kmeans":
        raise ConfigError(
            f"element '{found.element}' is accepted for weights only: codebooks cannot be fitted to every activation"
        )
    return found


def _fields_of(name: str, tensor: str) -> dict | None:
    if name not in PRESETS:
        raise ConfigError(unknown_name("format", name, PRESETS))
    return PRESETS[name][tensor]


def _override(preset: dict, overrides: dict, global_scale: str) -> dict:
    """Preset fields under ``overrides``, with the defaults implied by granularity, element and
    scale format."""
    merged = preset | _spell_out_groups(overrides)
    if merged.get("granularity", "channel") != "group" and "group_size" not in overrides:
        merged.pop("group_size", None)
    element = ELEMENT_FORMATS.get(overrides.get("element"))  # type: ignore[arg-type]
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
    """Expand ``group-64`` or a lone ``group_size`` to granularity and group size."""
    spelt, granularity, group_size = dict(overrides), overrides.get("granularity"), overrides.get("group_size")
    if isinstance(granularity, str) and granularity.startswith("group-"):
        parsed = Granularity.parse(granularity)
        if group_size not in (None, parsed.group_size):
            raise ConfigError(f"granularity '{granularity}' contradicts group_size {group_size}")
        spelt |= parsed.fields
    elif group_size is not None and granularity is None:
        spelt["granularity"] = "group"
    return spelt
