"""Axis names and their config entries. Standard library only; this module reads no weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from .. import schemes
from ..ground.errors import ConfigError, unknown_name
from ..models.folders import shape_of
from ..models.shapes import ModelShape
from ..quantization.linear_groups import FUSED
from ..schemes.granularities import cell_schemes
from ..schemes.granularity import Granularity
from . import registry
from .cells import AXES, MIXED, Cell
from .methods import Method

DIVERGENCE, BITS = "divergence", "bits"  # objectives of an allocation
ANY = "any"  # target without limits
ALLOCATION: dict[str, Any] = {
    "budget": None,
    "divergence": None,
    "groups": FUSED,
    "target": ANY,
    "objective": DIVERGENCE,
    "alternatives": 1,
    "rank": 1,
}


def entry(config: Mapping[str, Any], axis: str, name: str) -> dict[str, Any]:
    """Return the config entry of a name; a method or preset used by its name needs no entry, a
    seeded name gets its seed."""
    entries = config.get(axis, {})
    for mark in ("-s", "-a"):
        base, _, number = name.rpartition(mark)
        if name not in entries and base in entries and name in expanded_names(config, axis, base):
            return _variant(entries[base], int(number))
    if axis == "formats":
        given = entries.get(name, {})
        return dict(given) if "allocate" in given else {"preset": name, **given}
    return dict(entries.get(name) or registry.PUBLISHED[axis].get(name) or {"method": name})


def _variant(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Entry of one seed, or of one alternative of an allocation."""
    if "allocate" in entry:
        return {**entry, "allocate": {**entry["allocate"], "rank": number}}
    return {**{key: value for key, value in entry.items() if key != "seeds"}, "seed": number}


def without_note(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the keys of a config entry that serve only readers or checks."""
    return {key: value for key, value in entry.items() if key not in ("note", "published")}


def entry_names(config: Mapping[str, Any], axis: str, given: str, where: str) -> list[str]:
    """Resolve ``given``, at the config key ``where``, to names of entries (:func:`expanded_names`)."""
    names = expanded_names(config, axis, given)
    if names != [given]:
        return names
    if axis == "granularities":
        if given != "native":
            Granularity.parse(given, where)
        return [given]
    known = known_names(config, axis)
    if given not in known:
        raise ConfigError(f"{where}: {_of_another_axis(config, axis, given) or unknown_name(AXES[axis], given, known)}")
    return [given]


def _of_another_axis(config: Mapping[str, Any], axis: str, given: str) -> str:
    """Message about a name that another axis accepts and this one does not, in capitals or not; else empty."""
    owners = [
        other
        for other in ("transforms", "mitigations", "formats")
        if given.lower() in {name.lower() for name in known_names(config, other)}
    ]
    return "" if not owners or axis in owners else f"'{given}' is a {AXES[owners[0]]}, not a {AXES[axis]}"


def expanded_names(config: Mapping[str, Any], axis: str, given: str) -> list[str]:
    """List the names of an entry: its key, one name per seed if it lists ``seeds``, or one per
    alternative of an allocation."""
    entry = config.get(axis, {}).get(given) or {}
    if count := (entry.get("allocate") or {}).get("alternatives"):
        return [f"{given}-a{rank}" for rank in range(1, count + 1)]
    return [f"{given}-s{seed}" for seed in entry["seeds"]] if "seeds" in entry else [given]


def known_names(config: Mapping[str, Any], axis: str) -> set[str]:
    """List the names accepted on ``axis``: entries of the config, and names that need no entry."""
    builtin: Any = {"formats": schemes.PRESETS, **registry.METHODS}.get(axis, ())
    return {*config.get(axis, {}), *builtin, *registry.PUBLISHED.get(axis, ())}


def resolved(config: Mapping[str, Any], axis: str, name: str) -> tuple[Method, dict[str, Any]]:
    """Method of a name on the axis ``transforms`` or ``mitigations``, and its options with their defaults."""
    given = entry(config, axis, name)
    given.pop("calibration", None)
    method = registry.method(axis, given["method"])
    return method, method.resolve(given, f"{axis}.{name}")["options"]


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
    given = entry(config, "formats", cell.format)
    if "allocate" in given:
        return _allocated(config, given["allocate"], f"formats.{cell.format}")
    return _schemes(
        json.dumps(given),
        cell.granularity,
        f"formats.{cell.format}",
        _head_size(config, cell, given),
    )


def _head_size(config: Mapping[str, Any], cell: Cell, given: Mapping[str, Any]) -> int:
    """Channels of a head at the inputs of o; :class:`ConfigError` for scales by head of heads of several sizes."""
    sizes = shape(config, cell.model).widths("head_dim")
    if len(sizes) > 1 and (given.get("activation") or {}).get("by_head"):
        raise ConfigError(
            f"formats.{cell.format}.activation.by_head: model '{cell.model}' has heads of "
            f"{' and of '.join(map(str, sizes))} channels at the inputs of o, and a format has one size; leave it out, "
            f"or use groups that divide both, such as group-{math.gcd(*sizes)}"
        )
    return sizes[0]


def allocation(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of ``allocate`` of a format entry with their defaults."""
    return {**ALLOCATION, **given}


def candidates(config: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, tuple[str, str]]:
    """Candidates of an allocation: name (``w4a16 group-64``) -> format and granularity.

    :class:`ConfigError` for an unknown format or granularity.
    """
    found: dict[str, tuple[str, str]] = {}
    for number, text in enumerate(given["schemes"]):
        format, _, granularity = text.partition(" ")
        key = f"{where}.allocate.schemes.{number}"
        if "allocate" in entry(config, "formats", format):
            raise ConfigError(f"{key}: format '{format}' is itself an allocation; name formats with one scheme")
        (format,) = entry_names(config, "formats", format, key)
        found[text] = format, settled(config, (granularity or "native").strip(), format)
        Granularity.parse(found[text][1], key)
    return found


def candidate_formats(config: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Formats that the allocations among the formats ``names`` choose from."""
    given = [(name, entry(config, "formats", name)) for name in names]
    found = [candidates(config, item["allocate"], f"formats.{name}") for name, item in given if "allocate" in item]
    return {format for several in found for format, _ in several.values()}


def schemes_at(config: Mapping[str, Any], format: str, granularity: str) -> dict[str, Any]:
    """Schemes of a format with one scheme at a granularity, without a model."""
    return _schemes(json.dumps(entry(config, "formats", format)), granularity, f"formats.{format}", None)


def _allocated(config: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Schemes of a cell whose linears get one of several candidates."""
    found = {
        name: schemes_at(config, format, granularity)["weight"]
        for name, (format, granularity) in candidates(config, given, where).items()
    }
    tied = allocation(given)["groups"] == FUSED
    return {"weight": None, "activation": {}, "key_value": None, "candidates": found, "tied": tied}


def settled(config: Mapping[str, Any], granularity: str, format: str) -> str:
    """Replace ``native`` by the block of the format, one scale per channel, or the schemes of an allocation."""
    if granularity != "native":
        return granularity
    if "allocate" in entry(config, "formats", format):
        return MIXED
    return str(Granularity.of_block(schemes.PRESETS[preset(config, format)]["block"]))


@cache
def _schemes(entry: str, granularity: str, where: str, head_dim: int | None) -> dict[str, Any]:
    return cell_schemes(json.loads(entry), granularity, where, head_dim)
