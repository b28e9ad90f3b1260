"""The granularity axis: its names, and the weight and activation schemes that a format takes at one of them.

``tensor``   one scale per weight matrix; activations take one static scale per site, from calibration (a dynamic one would make
             a token's result depend on the batch it came in);
``channel``  one scale per output channel of a weight, and per token of an activation;
``group-N``  one scale per N consecutive input channels of a row, of weights and of tokens alike;
``native``   what a format is defined with: its own block, or ``channel`` where it has none.
Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError
from .schemes import PRESETS, activation_scheme, scheme

ACCEPTED = "tensor, channel, group-N (N a number, such as group-64), native"


def parse_granularity(name: str, where: str = "granularity") -> tuple[str, int | None]:
    """(``tensor`` | ``channel`` | ``group``, group size or None) of a granularity's name."""
    if name in ("tensor", "channel"):
        return name, None
    if (found := re.fullmatch(r"group-([1-9]\d*)", str(name))) is None:
        raise ConfigError(f"{where}: unknown granularity '{name}'. Accepted: {ACCEPTED}")
    return "group", int(found[1])


def cell_schemes(entry: Mapping[str, Any], granularity: str, where: str) -> dict[str, dict | None]:
    """The schemes of a format entry ``{preset, weight, activation}`` at a granularity, as dicts; None leaves a tensor unrounded.

    ``weight`` and ``activation`` override fields of the preset's schemes; ``activation: null`` leaves activations in full precision.
    """
    block = PRESETS[entry["preset"]]["block"]
    kind, group_size = parse_granularity(granularity, where)
    own = {} if block else {"granularity": kind, **({"group_size": group_size} if group_size else {})}
    found: dict[str, dict | None] = {}
    for tensor, build in (("weight", scheme), ("activation", activation_scheme)):
        overrides = entry.get(tensor, {})
        if overrides is None:
            found[tensor] = None
            continue
        try:
            built = build(entry["preset"], **{**own, **overrides})
        except ConfigError as error:
            raise ConfigError(f"{where}.{tensor}: {error}") from None
        found[tensor] = built.to_dict() if built else None
    return found
