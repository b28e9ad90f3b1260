"""Numbers of weights and of moments of a decoder, from its sizes. Standard library only."""

from __future__ import annotations

from .plans import LayerPlan
from .shapes import ModelShape


def layer_weights(shape: ModelShape) -> int:
    """Number of weights in the linears of the largest decoder layer."""
    return max(_weights(shape, plan) for plan, _ in shape.plans())


def all_weights(shape: ModelShape) -> int:
    """Number of weights in the linears of all decoder layers."""
    return sum(count * _weights(shape, plan) for plan, count in shape.plans())


def active_weights(shape: ModelShape) -> int:
    """Number of weights that one token is multiplied with in all decoder layers."""
    idle = 3 * (shape.experts - shape.active_experts) * shape.hidden_size * shape.expert_size
    return all_weights(shape) - idle * (shape.layers - len(shape.dense_layers))


def _weights(shape: ModelShape, plan: LayerPlan) -> int:
    return sum(rows * columns for rows, columns in map(shape.linear_size, plan.linears))


def layer_moments(shape: ModelShape) -> int:
    """Number of entries in the second moments of the inputs of the largest decoder layer."""
    return max(sum(shape.site_size(site) ** 2 for site in plan.sites) for plan, _ in shape.plans())


def held_moments(shape: ModelShape) -> int:
    """:func:`layer_moments` of what is in memory at a time: the inputs of experts follow one another."""
    found = []
    for plan, _ in shape.plans():
        sizes = {site: shape.site_size(site) ** 2 for site in plan.sites}
        one = max((sizes[site] for site in plan.expert_sites), default=0)
        found.append(sum(size for site, size in sizes.items() if site not in plan.expert_sites) + one)
    return max(found)
