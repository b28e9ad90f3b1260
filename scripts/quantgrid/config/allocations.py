"""Formats that allocate bits: ``{allocate: {budget, schemes, groups, target, objective, ...}}``.

Each group of linears gets one of the ``schemes``, texts ``FORMAT GRANULARITY`` of formats that round
weights alone. The objective ``divergence`` (the default) minimizes the predicted divergence within a
``budget`` of stored bits per weight, ``bits`` the bits for a predicted ``divergence``. A study that has an
allocation also has the cells of its candidates within the budget, which it is compared with. Standard
library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..exports.server_families import require_one_family
from ..ground.errors import ConfigError
from ..models.shapes import ModelShape
from ..quantization.linear_groups import LINEAR
from ..schemes.presets import PRESETS
from ..schemes.quant_scheme import QuantScheme
from . import entries
from .cells import MIXED, Cell
from .entries import ANY, BITS, DIVERGENCE

_OTHER = ("preset", "weight", "activation", "key_value", "linears")  # keys of a format with one scheme


def is_allocated(config: Mapping[str, Any], cell: Cell) -> bool:
    """Check whether the linears of a cell get one of several schemes."""
    return cell.quantized and "allocate" in entries.entry(config, "formats", cell.format)


def allocation_of(config: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """Keys of the allocation of a cell with their defaults."""
    return entries.allocation(entries.entry(config, "formats", cell.format)["allocate"])


def base_name(config: Mapping[str, Any], format: str) -> str:
    """Name of the entry of an allocated format, of whose alternatives it may be one."""
    return format if format in config["formats"] else format.rpartition("-a")[0]


def check_entry(config: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` for an allocation that no cell could have."""
    where = f"formats.{name}"
    if other := [key for key in _OTHER if key in entry]:
        raise ConfigError(f"{where}.{other[0]}: the schemes of an allocation are those of its candidates; leave it out")
    if name in PRESETS:
        raise ConfigError(f"{where}: '{name}' is the name of a built-in preset; rename this entry")
    found = entries.allocation(entry["allocate"])
    for objective, key in ((DIVERGENCE, "budget"), (BITS, "divergence")):
        if (needed := objective == found["objective"]) != (found[key] is not None):
            raise ConfigError(
                f"{where}.allocate.{key}: objective '{DIVERGENCE}' takes a budget, '{BITS}' a divergence; with "
                f"'{found['objective']}' {'give one' if needed else 'leave it out'}"
            )
    names = entries.expanded_names(config, "formats", name)
    if taken := [other for other in names if other != name and other in config["formats"]]:
        raise ConfigError(f"{where}.allocate.alternatives: the name '{taken[0]}' already has an entry; rename it")
    _check_candidates(config, found, where)


def _check_candidates(config: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    schemes: dict[QuantScheme, str] = {}
    for name, (format, granularity) in entries.candidates(config, given, where).items():
        key = f"{where}.allocate.schemes"
        found = entries.schemes_at(config, format, granularity)
        if found["weight"] is None or found["activation"] or found["key_value"] or "linears" in found:
            raise ConfigError(
                f"{key}: format '{format}' rounds more or less than the weights of all linears, and bits are "
                "allocated to weights alone; use a preset such as w4a16, or an entry with activation: null"
            )
        scheme = QuantScheme.from_dict(found["weight"])
        if schemes.setdefault(scheme, name) != name:
            raise ConfigError(f"{key}: '{name}' and '{schemes[scheme]}' are the same scheme; keep one")
        if scheme.global_scale == "site" and given["groups"] == LINEAR:
            raise ConfigError(
                f"{key}: '{name}' shares a global scale by site, so the linears of a site need one scheme; use "
                "groups: fused"
            )
    if given["target"] == ANY:
        return
    if given["groups"] == LINEAR:
        raise ConfigError(f"{where}.allocate.groups: {given['target']} fuses linears; use groups: fused")
    require_one_family(given["target"], {name: scheme for scheme, name in schemes.items()}, f"{where}.allocate.target")


def stored_bits(shape: ModelShape, scheme: QuantScheme) -> float:
    """Stored bits per weight of a model whose linears all have ``scheme``."""
    sizes = [(shape.linear_size(linear), count) for plan, count in shape.plans() for linear in plan.linears]
    total = sum(m * n * count for (m, n), count in sizes)
    return sum(scheme.bits_per_element(size) * size[0] * size[1] * count for size, count in sizes) / total


def most_bits(config: Mapping[str, Any], cell: Cell) -> float:
    """Stored bits per weight that an allocated cell has at most: its budget, or those of its largest candidate."""
    budget = allocation_of(config, cell)["budget"]
    if budget is not None:
        return budget
    shape, found = entries.shape(config, cell.model), entries.resolved_schemes(config, cell)["candidates"]
    return max(stored_bits(shape, QuantScheme.from_dict(fields)) for fields in found.values())


def uniform_cells(config: Mapping[str, Any], cell: Cell) -> Iterator[Cell]:
    """Cells that an allocated cell is compared with: those of its candidates, within the budget if it has one."""
    if not is_allocated(config, cell):
        return
    given = allocation_of(config, cell)
    found = entries.resolved_schemes(config, cell)["candidates"]
    for name, (format, granularity) in entries.candidates(config, given, f"formats.{cell.format}").items():
        bits = stored_bits(entries.shape(config, cell.model), QuantScheme.from_dict(found[name]))
        if given["budget"] is None or bits <= given["budget"]:
            yield Cell(cell.model, cell.transform, cell.mitigation, granularity, format)


def check_cell(config: Mapping[str, Any], cell: Cell, where: str) -> None:
    """Reject an allocated cell whose budget, transform or mitigation allows no allocation."""
    given, at = allocation_of(config, cell), f"formats.{cell.format}.allocate"
    if cell.granularity != MIXED:
        raise ConfigError(
            f"{where}: the schemes of format '{cell.format}' state their granularity, so '{cell.granularity}' "
            "contradicts them; use 'native', or exclude the pair"
        )
    shape = entries.shape(config, cell.model)
    candidates = entries.resolved_schemes(config, cell)["candidates"]
    bits = {name: stored_bits(shape, QuantScheme.from_dict(fields)) for name, fields in candidates.items()}
    smallest = min(bits, key=lambda name: bits[name])
    if given["budget"] is not None and given["budget"] < bits[smallest]:
        raise ConfigError(
            f"{at}.budget: {given['budget']:g} stored bits per weight are fewer than those of the smallest scheme, "
            f"'{smallest}' with {bits[smallest]:.4g} on model '{cell.model}'"
        )
    _check_methods(config, cell, where)


def _check_methods(config: Mapping[str, Any], cell: Cell, where: str) -> None:
    transform, options = entries.resolved(config, "transforms", cell.transform)
    if transform.is_fitted_to_scheme(options):
        raise ConfigError(
            f"{where}: transform '{cell.transform}' is fitted to one scheme, format '{cell.format}' has several; use a "
            "transform that is not fitted to a scheme, such as 'none', 'scaling' or 'random_hadamard'"
        )
    mitigation, options = entries.resolved(config, "mitigations", cell.mitigation)
    if mitigation.training or options.get("propagation") == "sequential":
        raise ConfigError(
            f"{where}: mitigation '{cell.mitigation}' solves linears in view of each other, and the errors of an "
            "allocation are those of single linears; use one with cached statistics, such as 'gptq' or 'rtn'"
        )
    calibration = entries.entry(config, "mitigations", cell.mitigation).get("calibration", "default")
    corpus = config["calibrations"][calibration]["corpus"]
    if mitigation.reads_statistics and config["corpora"][corpus].get("windows", 2) < 2:
        raise ConfigError(
            f"{where}: mitigation '{cell.mitigation}' is fitted to one half of the windows and measured on the other, "
            f"and corpus '{corpus}' has one window; set its 'windows' to at least 2"
        )
