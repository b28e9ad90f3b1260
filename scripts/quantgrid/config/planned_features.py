"""Features of a cell for export targets, from the config alone: schemes, the options of its methods and
the shape of its model. Standard library only.

``exports.packed_cell`` reads the same features from a checkpoint. Two cases are decided there alone:
keys of a hub model's config that add biases, and sites whose candidate elements differ.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..exports.features import Features
from ..exports.targets import judge
from ..exports.verdicts import Verdict
from ..models.plans import SITES
from ..models.shapes import ModelShape
from ..schemes.cell_schemes import CellSchemes
from . import entries
from .cells import Cell
from .methods import STREAM, STREAM_SITES, VALUES, Method


def planned_verdict(config: Mapping[str, Any], cell: Cell, target: str, flags: Collection[str] = ()) -> Verdict:
    """Verdict of an export target on a valid cell, before it is quantized.

    Raises :class:`ConfigError` for an unknown target or flag.
    """
    return judge(target, planned_features(config, cell), flags=flags)


def planned_features(config: Mapping[str, Any], cell: Cell) -> Features:
    """Features of a valid cell."""
    shape, schemes = entries.shape(config, cell.model), CellSchemes.from_dict(entries.resolved_schemes(config, cell))
    transform, options = entries.resolved(config, "transforms", cell.transform)
    mitigation, chosen = entries.resolved(config, "mitigations", cell.mitigation)
    has_term = "branch_input" in chosen and chosen["rank"] != 0
    weights = schemes.weights
    return Features(
        shape,
        schemes,
        online_operations(transform, options, shape),
        frozenset({chosen["branch_input"]} if has_term and weights else ()),
        mitigation.keeps_outliers and chosen["rank"] != 0 and bool(weights),
        _biased(transform, options, shape),
        bool(transform.clips_activations(options) and any(schemes.activation.values())),
        any(weight.global_scale == "site" for weight in weights)
        and all(weight.global_scale in ("none", "site") for weight in weights),
    )


def online_operations(transform: Method, options: Mapping[str, Any], shape: ModelShape) -> dict[str, tuple[str, ...]]:
    """Kind of site -> the operations that a transform with these resolved ``options`` leaves to the run
    time; sites without one are absent."""
    found: dict[str, list[str]] = {site: [] for site in SITES}
    for site in shifted_sites(transform, options):
        if not _is_everywhere(shape, site, "shifts"):  # else it becomes the bias of v
            found[site].append("subtract")
    heads = shape.widths("head_dim") if _is_everywhere(shape, "output_input", "turns") else ()
    declared = [
        operation
        for operation in transform.online
        if operation.exists(options) and not (heads and operation.at == VALUES)
    ]
    for operation in declared:
        for site in operation.sites(options, heads):
            found[site].append(operation.name(options))
    rotated = STREAM_SITES if any(operation.at == STREAM for operation in declared) else ()
    for site in transform.divided_sites(options) if transform.divides_online(options) else ():
        if site in rotated or not _is_everywhere(shape, site, "is_divisible"):
            found[site].append("multiply")
    return {site: tuple(operations) for site, operations in found.items() if operations}


def _is_everywhere(shape: ModelShape, kind: str, quality: str) -> bool:
    """Whether all sites of a ``kind`` have a quality."""
    return all(getattr(site, quality) for site in shape.sites(kind))


def shifted_sites(transform: Method, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Sites that a transform centres with these resolved ``options``."""
    return tuple(options[transform.shifts]) if transform.shifts else ()


def _biased(transform: Method, options: Mapping[str, Any], shape: ModelShape) -> tuple[str, ...]:
    """Kinds of linears that get a bias which the architecture does not have by default."""
    own = shape.family.biased({})
    sites = shifted_sites(transform, options)
    found = [
        linear
        for site in sites
        for linear in (*SITES[site], *(("v",) if _is_everywhere(shape, site, "shifts") else ()))
    ]
    return tuple(linear for linear in dict.fromkeys(found) if linear in shape.family.linears and linear not in own)
