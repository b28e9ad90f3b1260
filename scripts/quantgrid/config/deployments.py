"""Kinds of deployment: the tensors that a recipe rounds, their bits, and whether a server has to run
online operations. Standard library only.

Recipes of different kinds are not alternatives to each other: a server for rounded weights alone
reads activations in full precision, and online operations need kernels of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from .. import schemes
from ..ground.errors import ConfigError, unknown_name
from ..schemes.granularities import cell_schemes
from ..schemes.number_formats import ELEMENT_FORMATS

# the tensors that recipes of a kind round -> words; keys and values count as activations
ROUNDED = {
    "weights": "weights only",
    "weights-activations": "weights and activations",
    "activations": "activations only",
}
ONLINE = "+online"
_FULL_BITS = 16


@dataclass(frozen=True)
class Bits:
    """Bits per number of weights, of linears' inputs, and of keys and values; 16 where a format leaves
    them in full precision. ``least``: those of the narrowest candidate of an allocation, else 0.
    ``granularity``: name of that of the weights, which a format may set itself; empty where none is known."""

    weight: int
    activation: int
    key_value: int
    least: int = 0
    granularity: str = ""

    @property
    def label(self) -> str:
        """``W4A16``; with rounded keys and values ``W4A8KV8``; of an allocation ``W3-8A16``."""
        cached = f"KV{self.key_value}" if self.key_value < _FULL_BITS else ""
        weight = f"{self.least}-{self.weight}" if self.least else self.weight
        return f"W{weight}A{self.activation}{cached}"

    @property
    def rounded(self) -> str:
        """The kind in ``ROUNDED``; empty for full precision."""
        activations = min(self.activation, self.key_value) < _FULL_BITS
        if self.weight < _FULL_BITS:
            return "weights-activations" if activations else "weights"
        return "activations" if activations else ""


@dataclass(frozen=True)
class Deployment:
    """A kind of deployment: what is rounded (a key of ``ROUNDED``), and whether ``online`` operations
    are allowed. A kind that allows them also holds the recipes without any."""

    rounded: str
    online: bool

    @property
    def name(self) -> str:
        """Name for commands, such as ``weights`` or ``weights+online``."""
        return self.rounded + ONLINE * self.online

    @property
    def title(self) -> str:
        """Words for readers."""
        return f"{ROUNDED[self.rounded]}, {'online operations allowed' if self.online else 'no online operations'}"

    def holds(self, rounded: str, online: bool) -> bool:
        """Check whether a recipe that rounds these tensors, with or without online operations, is one of
        the kind."""
        return rounded == self.rounded and (self.online or not online)


DEPLOYMENTS = {
    found.name: found for rounded in ROUNDED for online in (False, True) for found in [Deployment(rounded, online)]
}


def deployment(name: str, where: str = "DEPLOYMENT") -> Deployment:
    """Look up a kind by its name; :class:`ConfigError` lists the names."""
    if name not in DEPLOYMENTS:
        raise ConfigError(f"{where}: {unknown_name('deployment', name, DEPLOYMENTS)}")
    return DEPLOYMENTS[name]


def present(recipes: Iterable[tuple[str, bool]]) -> list[Deployment]:
    """List the kinds of these recipes (rounded tensors, with online operations or not), in the order of
    ``DEPLOYMENTS``; a kind is listed if a recipe of exactly this kind exists."""
    found = set(recipes)
    return [kind for kind in DEPLOYMENTS.values() if (kind.rounded, kind.online) in found]


def bits(formats: Mapping[str, Any], name: str, granularity: str) -> Bits:
    """Bits of a format, an entry of ``formats`` or the name of a preset, at a granularity.

    Of several candidate elements, or schemes of an allocation, the widest counts. Raises
    :class:`ConfigError` for a name that is neither.
    """
    base = name if name in formats else name.rpartition("-a")[0]
    given = formats.get(base) or {}
    if "allocate" in given:
        widths = {bits(formats, text.partition(" ")[0], "channel").weight for text in given["allocate"]["schemes"]}
        return Bits(max(widths), _FULL_BITS, _FULL_BITS, min(widths))
    entry = {"preset": name, **(formats.get(name) or {})}
    if entry["preset"] not in schemes.PRESETS:
        known = {*formats, *schemes.PRESETS}
        raise ConfigError(f"formats: {unknown_name('format', name, known)}; name the config that the results are from")
    return _bits(json.dumps(entry, sort_keys=True), granularity, name)


@cache
def _bits(entry: str, granularity: str, name: str) -> Bits:
    if granularity == "-":
        return Bits(_FULL_BITS, _FULL_BITS, _FULL_BITS)
    found = cell_schemes(json.loads(entry), granularity, f"formats.{name}", None)
    weight, key_value = found["weight"], found["key_value"]
    elements = [candidate["element"] for candidates in found["activation"].values() for candidate in candidates]
    return Bits(
        _width(weight["element"]) if weight else _FULL_BITS,
        max(map(_width, elements), default=_FULL_BITS),
        _width(key_value["scheme"]["element"]) if key_value else _FULL_BITS,
        granularity=_granularity(weight) if weight else "",
    )


def _granularity(scheme: Mapping[str, Any]) -> str:
    return f"group-{scheme['group_size']}" if scheme["granularity"] == "group" else scheme["granularity"]


def _width(element: str) -> int:
    return ELEMENT_FORMATS[element].bits
