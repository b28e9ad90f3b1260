"""Groups of linears that have one scheme in an allocation of bits. Standard library only.

Servers fuse linears that read one input (q, k and v; gate and up) and all routed experts of a layer, and
compute each of these in one format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..models.plans import LayerPlan, is_in_mixture, is_routed, kind_of, linear_key
from ..models.shapes import ModelShape

FUSED, LINEAR = "fused", "linear"  # kinds of groups


def fused_groups(plan: LayerPlan) -> list[list[str]]:
    """Linears of a layer that a server fuses: those of a site, routed experts together, shared ones apart."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, site in plan.sites.items():
        for linear in site.linears:
            part = "routed" if is_routed(linear) else "shared" if is_in_mixture(linear) else name
            found.setdefault((kind_of(name), part), []).append(linear)
    return list(found.values())


def linear_groups(shape: ModelShape, kind: str = FUSED) -> list[list[str]]:
    """Groups of linears (``0.q``) of a model: ``fused``, or every ``linear`` by itself."""
    found = [
        [linear_key(index, linear) for linear in group]
        for index in range(shape.layers)
        for group in fused_groups(shape.plan(index))
    ]
    return found if kind == FUSED else [[linear] for group in found for linear in group]


def is_tied(shape: ModelShape, chosen: Mapping[str, Any]) -> bool:
    """Check whether the linears of every fused group have one entry in ``chosen``."""
    return all(len({chosen.get(linear) for linear in group}) == 1 for group in linear_groups(shape))
