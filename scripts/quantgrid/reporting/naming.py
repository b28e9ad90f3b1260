"""What else a cell's axis values are called: a config names its entries freely, published numbers and claims speak of methods and presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import grid

METHOD = {"transform": ("transforms", "method"), "mitigation": ("mitigations", "method"), "format": ("formats", "preset")}


def names(config: Mapping[str, Any], axis: str, value: str) -> set[str]:
    """All names of one axis value: its own, that of the entry whose seeds it belongs to, its method or preset; of a model, its id's last part.

    Lower case. A preset counts only where the entry takes it whole or changes no more than its ranges: another scale is another format, and so
    are some linears alone.
    """
    found = {value.lower()}
    if axis == "model":
        entry = config["models"].get(value, {})
        return found | {str(entry[key]).rpartition("/")[2].lower() for key in ("id",) if key in entry}
    if axis not in METHOD:
        return found
    plural, key = METHOD[axis]
    entry = grid.entry(config, plural, value)
    if axis != "format" or plain(entry):
        found.add(entry.get(key, value).lower())
    base, _, seed = value.rpartition("-s")
    return found | ({base.lower()} if seed.isdecimal() and base in config.get(plural, {}) else set())


def plain(entry: Mapping[str, Any]) -> bool:
    """Whether a format entry is its preset but for how ranges are found."""
    changed = {key for tensor in ("weight", "activation", "key_value") for key in (entry.get(tensor) or {}) if not key.startswith(("range", "mse_"))}
    return not changed and "linears" not in entry and all(entry.get(tensor, ...) is not None for tensor in ("weight", "activation"))
