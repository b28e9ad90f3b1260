"""The granularity axis: its names, and the schemes that a format entry takes at one of them.

``tensor``   one scale per weight matrix; activations take one static scale per site, from calibration (a dynamic one would make
             a token's result depend on the batch it came in);
``channel``  one scale per output channel of a weight, and per token of an activation;
``group-N``  one scale per N consecutive input channels of a row, of weights and of tokens alike;
``native``   what a format is defined with: its own block, or ``channel`` where it has none.
Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from .architecture import LINEARS, SITES
from .errors import ConfigError, shortened
from .schemes import PRESETS, QuantScheme, activation_scheme, scheme

ACCEPTED = "tensor, channel, group-N (N a number of at most nine digits, such as group-64), native"


def parse_granularity(name: str, where: str = "granularity") -> tuple[str, int | None]:
    """(``tensor`` | ``channel`` | ``group``, group size or None) of a granularity's name."""
    if name in ("tensor", "channel"):
        return name, None
    if (found := re.fullmatch(r"group-([1-9][0-9]{0,8})", str(name))) is None:
        raise ConfigError(f"{where}: unknown granularity '{shortened(str(name))}'. Accepted: {ACCEPTED}")
    return "group", int(found[1])


def cell_schemes(entry: Mapping[str, Any], granularity: str, where: str, head_dim: int | None = None) -> dict[str, Any]:
    """What a format entry ``{preset, weight, activation, key_value}`` rounds at a granularity, ready for JSON.

    ``weight``: the scheme as a dict, or None; ``activation``: site -> the candidate schemes of its input, one unless the entry lists
    several elements, no site where activations stay in full precision; ``key_value``: ``{scheme, rotate_keys}`` or None. ``weight`` and
    ``activation`` override fields of the preset's schemes, null leaves the tensor in full precision. An entry's ``linears`` (of q, k, v, o,
    gate, up, down; there where they are not all) are the only ones whose weight and input are rounded. Without a ``head_dim``, when no
    model is at hand yet, ``by_head`` groups nothing. Raises :class:`ConfigError` with the key below ``where``.
    """
    preset = PRESETS[entry["preset"]]
    kind, group_size = parse_granularity(granularity, where)
    own = {} if preset["block"] else {"granularity": kind, **({"group_size": group_size} if group_size else {})}
    weight, activation, key_value = entry.get("weight", {} if preset["weight"] else None), entry.get("activation", {}), entry.get("key_value")
    found: dict[str, Any] = {"weight": None, "activation": {}, "key_value": None}
    if weight is not None:
        found["weight"] = _located(f"{where}.weight", lambda: _weight(entry["preset"], _at(own, weight)))
    if activation is not None:
        found["activation"] = _located(f"{where}.activation", lambda: _activation(entry["preset"], _at(own, activation), head_dim))
    chosen = [linear for linear in LINEARS if linear in entry.get("linears", LINEARS)]
    if len(chosen) < len(LINEARS):
        found |= {"linears": chosen, "activation": {site: schemes for site, schemes in found["activation"].items() if {*SITES[site]} & {*chosen}}}
    if key_value is not None:
        found["key_value"] = _located(f"{where}.key_value", lambda: _key_value({"preset": entry["preset"], **key_value}))
    return found


def _at(own: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``overrides`` at the granularity of the cell, unless they name one themselves."""
    return dict(overrides) if {"granularity", "group_size"} & set(overrides) else {**own, **overrides}


def _located(where: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns; its :class:`ConfigError` gets the config key in front."""
    try:
        return make()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _candidates(preset: str, overrides: Mapping[str, Any]) -> list[QuantScheme]:
    """The activation schemes of a preset under ``overrides``, one per element where these list several; none in full precision."""
    elements = overrides.get("element")
    listed = [{**overrides, "element": element} for element in elements] if isinstance(elements, list) else [overrides]
    return [found for fields in listed if (found := activation_scheme(preset, **fields))]


def _weight(preset: str, overrides: Mapping[str, Any]) -> dict:
    found = scheme(preset, **overrides)
    if found.global_scale == "static":
        raise ConfigError("global_scale 'static' comes from calibration, which activations have; weights take 'none', 'tensor' or 'token'")
    return found.to_dict()


def _activation(preset: str, overrides: Mapping[str, Any], head_dim: int | None) -> dict[str, list[dict]]:
    """Site -> candidates; ``by_head`` among the overrides cuts scales of tokens and of groups wider than a head at ``output_input``."""
    fields = {name: value for name, value in overrides.items() if name != "by_head"}
    candidates = [candidate.to_dict() for candidate in _candidates(preset, fields)]
    found = dict.fromkeys(SITES, candidates) if candidates else {}
    if candidates and head_dim and overrides.get("by_head"):
        width = {"tensor": 0, "channel": math.inf, "group": candidates[0]["group_size"]}[candidates[0]["granularity"]]
        if width > head_dim:
            found["output_input"] = [{**candidate, "granularity": "group", "group_size": head_dim} for candidate in candidates]
    return found


def _key_value(given: Mapping[str, Any]) -> dict[str, Any]:
    """``{scheme, rotate_keys}`` of keys and values: the activation scheme of a preset, per token and head or in groups within a head."""
    fields = {name: value for name, value in given.items() if name not in ("preset", "rotate_keys")}
    if given["preset"] not in PRESETS or PRESETS[given["preset"]]["activation"] is None:
        accepted = ", ".join(sorted(name for name, preset in PRESETS.items() if preset["activation"]))
        raise ConfigError(f"preset '{given['preset']}' has no scheme for activations, which keys and values take; name a preset that has: {accepted}")
    found = activation_scheme(given["preset"], **fields)
    if not found.rows_are_independent:
        raise ConfigError("keys and values are rounded token by token as they enter the cache: granularity 'channel' or 'group', "
                          "global_scale 'none' or 'token'")
    return {"scheme": found.to_dict(), "rotate_keys": bool(given.get("rotate_keys", False))}


def searched(found: Mapping[str, Any], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The schemes of a cell under the option ``weight_range`` of its mitigation: ``mse`` takes the place of extremes, and of no other range."""
    weight = found["weight"]
    if options.get("weight_range", "format") == "format" or weight is None or weight["range"] != "minmax":
        return dict(found)
    try:
        return {**found, "weight": QuantScheme.from_dict({**weight, "range": options["weight_range"]}).to_dict()}
    except ConfigError as error:
        raise ConfigError(f"{where}: weight_range '{options['weight_range']}': {error}") from None
