"""Names of a cell's axis values: a config names its entries freely, published numbers and claims
use names of methods and presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config import entries

METHOD = {
    "transform": ("transforms", "method"),
    "mitigation": ("mitigations", "method"),
    "format": ("formats", "preset"),
}


def names(config: Mapping[str, Any], axis: str, value: str) -> set[str]:
    """List all names of one axis value: its name, the entry that its seed belongs to, its method or
    preset; for a model the last part of its id.

    Lower case. A preset counts only if the entry changes nothing except its ranges: another scale,
    or a change of some linears only, is another format.
    """
    found = {value.lower()}
    if axis == "model":
        entry = config["models"].get(value, {})
        return found | {str(entry[key]).rpartition("/")[2].lower() for key in ("id",) if key in entry}
    if axis not in METHOD:
        return found
    plural, key = METHOD[axis]
    entry = entries.entry(config, plural, value)
    if axis != "format" or plain(entry):
        found.add(entry.get(key, value).lower())
    base, _, seed = value.rpartition("-s")
    return found | ({base.lower()} if seed.isdecimal() and base in config.get(plural, {}) else set())


def plain(entry: Mapping[str, Any]) -> bool:
    """Check whether a format entry differs from its preset only in the range estimation."""
    changed = {
        key
        for tensor in ("weight", "activation", "key_value")
        for key in (entry.get(tensor) or {})
        if not key.startswith(("range", "mse_"))
    }
    return (
        not changed
        and "linears" not in entry
        and all(entry.get(tensor, ...) is not None for tensor in ("weight", "activation"))
    )
