"""Axis names and their config entries. Standard library only; this module reads no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from .. import schemes
from ..ground.errors import ConfigError, unknown_name
from ..models.folders import shape_of
from ..models.shapes import ModelShape
from ..schemes.granularities import cell_schemes
from ..schemes.granularity import Granularity
from . import registry
from .cells import AXES, Cell


def entry(config: Mapping[str, Any], axis: str, name: str) -> dict[str, Any]:
    """Return the config entry of a name; a method or preset used by its name needs no entry, a
    seeded name gets its seed."""
    entries = config.get(axis, {})
    base, _, seed = name.rpartition("-s")
    if name not in entries and base in entries and name in expanded_names(config, axis, base):
        return {**{key: value for key, value in entries[base].items() if key != "seeds"}, "seed": int(seed)}
    if axis == "formats":
        return {"preset": name, **entries.get(name, {})}
    return dict(entries.get(name) or registry.PUBLISHED[axis].get(name) or {"method": name})


def without_note(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the keys of a config entry that serve only readers or checks."""
    return {key: value for key, value in entry.items() if key not in ("note", "published")}


def entry_names(config: Mapping[str, Any], axis: str, given: str, where: str) -> list[str]:
    """Resolve ``given``, at the config key ``where``, to names of entries: itself, or one per seed
    if its entry lists ``seeds``."""
    names = expanded_names(config, axis, given)
    if names != [given]:
        return names
    if axis == "granularities":
        if given != "native":
            Granularity.parse(given, where)
        return [given]
    known = known_names(config, axis)
    if given not in known:
        raise ConfigError(f"{where}: {unknown_name(AXES[axis], given, known)}")
    return [given]


def expanded_names(config: Mapping[str, Any], axis: str, given: str) -> list[str]:
    """List the names of an entry: its key, or one name per seed if it lists ``seeds``."""
    seeds = (config.get(axis, {}).get(given) or {}).get("seeds")
    return [given] if seeds is None else [f"{given}-s{seed}" for seed in seeds]


def known_names(config: Mapping[str, Any], axis: str) -> set[str]:
    """List the names accepted on ``axis``: entries of the config, and names that need no entry."""
    builtin: Any = {"formats": schemes.PRESETS, **registry.METHODS}.get(axis, ())
    return {*config.get(axis, {}), *builtin, *registry.PUBLISHED.get(axis, ())}


def preset(config: Mapping[str, Any], name: str) -> str:
    """Return the preset of a format; :class:`ConfigError` if there is none of that name."""
    found = entry(config, "formats", name)["preset"]
    if found not in schemes.PRESETS:
        raise ConfigError(f"formats.{name}.preset: {unknown_name('preset', found, schemes.PRESETS)}")
    return found


def shape(config: Mapping[str, Any], model: str) -> ModelShape:
    """Return the shape declared by a model's config entry; a local folder is read once."""
    return _shape(model, json.dumps(config["models"][model]))


@cache
def _shape(name: str, entry: str) -> ModelShape:
    return shape_of(json.loads(entry), f"models.{name}")


def resolved_schemes(config: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """Resolve the schemes of a cell for its model (:func:`granularities.cell_schemes`), every field
    filled in."""
    if not cell.quantized:
        return {"weight": None, "activation": {}, "key_value": None}
    return _schemes(
        json.dumps(entry(config, "formats", cell.format)),
        cell.granularity,
        f"formats.{cell.format}",
        shape(config, cell.model).head_dim,
    )


@cache
def _schemes(entry: str, granularity: str, where: str, head_dim: int) -> dict[str, Any]:
    return cell_schemes(json.loads(entry), granularity, where, head_dim)
