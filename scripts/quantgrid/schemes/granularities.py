"""Granularity axis: its names, and the schemes of a format entry at one granularity.

``tensor``   one scale per weight matrix; activations take one static scale per site, from
             calibration (a dynamic one would make a token's result depend on its batch);
``channel``  one scale per output channel of a weight, and per token of an activation;
``group-N``  one scale per N consecutive input channels of a row, of weights and tokens alike;
``native``   the block that the format defines, or ``channel`` if it defines none.
Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..ground.errors import ConfigError
from ..models.plans import LINEARS, SITES
from .granularity import Granularity
from .named import activation_scheme, scheme
from .presets import PRESETS
from .quant_scheme import QuantScheme


def cell_schemes(entry: Mapping[str, Any], granularity: str, where: str, head_dim: int | None = None) -> dict[str, Any]:
    """Schemes of a format entry ``{preset, weight, activation, key_value}``, ready for JSON.

    ``weight``: the scheme as a dict, or None. ``activation``: site -> candidate schemes of its
    input (one unless the entry lists several elements); sites in full precision are absent.
    ``key_value``: ``{scheme, rotate_keys}`` or None. In the entry, ``weight`` and ``activation``
    override fields of the preset's schemes; null leaves the tensor in full precision. ``linears``
    (of q, k, v, o, gate, up, down; absent for all) names the linears whose weight and input are
    rounded. Without a ``head_dim`` (no model is known yet) ``by_head`` groups nothing. Raises
    :class:`ConfigError` with the key below ``where``.
    """
    preset = PRESETS[entry["preset"]]
    parsed = Granularity.parse(granularity, where)
    own = {} if preset["block"] else parsed.fields
    weight, activation, key_value = (
        entry.get("weight", {} if preset["weight"] else None),
        entry.get("activation", {}),
        entry.get("key_value"),
    )
    found: dict[str, Any] = {"weight": None, "activation": {}, "key_value": None}
    if weight is not None:
        found["weight"] = _located(f"{where}.weight", lambda: _weight(entry["preset"], _at(own, weight)))
    if activation is not None:
        found["activation"] = _located(
            f"{where}.activation", lambda: _activation(entry["preset"], _at(own, activation), head_dim)
        )
    chosen = [linear for linear in LINEARS if linear in entry.get("linears", LINEARS)]
    if len(chosen) < len(LINEARS):
        found |= {
            "linears": chosen,
            "activation": {
                site: schemes for site, schemes in found["activation"].items() if {*SITES[site]} & {*chosen}
            },
        }
    if key_value is not None:
        found["key_value"] = _located(
            f"{where}.key_value", lambda: _key_value({"preset": entry["preset"], **key_value})
        )
    return found


def _at(own: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``overrides`` at the granularity of the cell, unless they set one."""
    return dict(overrides) if {"granularity", "group_size"} & set(overrides) else {**own, **overrides}


def _located(where: str, make: Callable[[], Any]) -> Any:
    """Call ``make``; prefix its :class:`ConfigError` with the config key."""
    try:
        return make()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _candidates(preset: str, overrides: Mapping[str, Any]) -> list[QuantScheme]:
    """Activation schemes of a preset under ``overrides``: one per listed element, none in full
    precision."""
    elements = overrides.get("element")
    listed = [{**overrides, "element": element} for element in elements] if isinstance(elements, list) else [overrides]
    return [found for fields in listed if (found := activation_scheme(preset, **fields))]


def _weight(preset: str, overrides: Mapping[str, Any]) -> dict:
    found = scheme(preset, **overrides)
    if found.global_scale == "static":
        raise ConfigError(
            "global_scale 'static' comes from calibration of activations; weights accept 'none', 'tensor', 'token' or "
            "'site'"
        )
    return found.to_dict()


def _activation(preset: str, overrides: Mapping[str, Any], head_dim: int | None) -> dict[str, list[dict]]:
    """Site -> candidate schemes.

    ``by_head`` among the overrides limits token and group scales at ``output_input`` to one head.
    """
    fields = {name: value for name, value in overrides.items() if name != "by_head"}
    found_schemes = _candidates(preset, fields)
    if any(candidate.global_scale == "site" for candidate in found_schemes):
        raise ConfigError(
            "global_scale 'site' is shared by the weights that read a site; activations accept 'none', 'tensor', "
            "'token' or 'static'"
        )
    candidates = [candidate.to_dict() for candidate in found_schemes]
    found = dict.fromkeys(SITES, candidates) if candidates else {}
    if candidates and head_dim and overrides.get("by_head"):
        width = {"tensor": 0, "channel": math.inf, "group": candidates[0]["group_size"]}[candidates[0]["granularity"]]
        if width > head_dim:
            found["output_input"] = [
                {**candidate, "granularity": "group", "group_size": head_dim} for candidate in candidates
            ]
    return found


def _key_value(given: Mapping[str, Any]) -> dict[str, Any]:
    """``{scheme, rotate_keys}`` of keys and values.

    The scheme is the activation scheme of a preset, per token and head or in groups within a head.
    """
    fields = {name: value for name, value in given.items() if name not in ("preset", "rotate_keys")}
    if given["preset"] not in PRESETS or PRESETS[given["preset"]]["activation"] is None:
        accepted = ", ".join(sorted(name for name, preset in PRESETS.items() if preset["activation"]))
        raise ConfigError(
            f"preset '{given['preset']}' has no activation scheme, which keys and values need; "
            f"presets that have one: {accepted}"
        )
    found = activation_scheme(given["preset"], **fields)
    if not found.rows_are_independent:  # type: ignore[union-attr]
        raise ConfigError(
            "keys and values are rounded token by token in the cache; accepted: granularity 'channel' or 'group', "
            "global_scale 'none' or 'token'"
        )
    return {"scheme": found.to_dict(), "rotate_keys": bool(given.get("rotate_keys", False))}  # type: ignore[union-attr]


def searched(found: Mapping[str, Any], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Schemes of a cell under the option ``weight_range`` of its mitigation, candidates of an allocation too.

    ``mse`` replaces ``minmax`` and no other range.
    """
    wanted = options.get("weight_range", "format")

    def ranged(weight: dict[str, Any] | None) -> dict[str, Any] | None:
        if wanted == "format" or weight is None or weight["range"] != "minmax":
            return weight
        return _located(
            f"{where}: weight_range '{wanted}'", lambda: QuantScheme.from_dict({**weight, "range": wanted}).to_dict()
        )

    several = {name: ranged(weight) for name, weight in found.get("candidates", {}).items()}
    return {**found, "weight": ranged(found["weight"]), **({"candidates": several} if several else {})}
