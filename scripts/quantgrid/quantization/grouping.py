"""Groups of layers, and of linears in them, that one call solves."""

from __future__ import annotations

from ..machine.malloc import layer_bytes
from ..models.plans import is_routed
from ..models.shapes import ModelShape


def chunks(shape: ModelShape, budget: int) -> list[range]:
    """Split the layers into groups of one plan whose weights and second moments fit in ``budget`` bytes."""
    size = max(1, budget // layer_bytes(shape))
    groups: list[range] = []
    for index in range(shape.layers):
        last = groups[-1] if groups else range(0)
        if 0 < len(last) < size and shape.plan(last[0]) is shape.plan(index):
            groups[-1] = range(last.start, index + 1)
        else:
            groups.append(range(index, index + 1))
    return groups


def batches(shape: ModelShape, group: range, budget: int) -> list[list[str]]:
    """Linears that are solved together in every layer of ``group``, in the order of their sites.

    One linear, or as many experts of one linear as fit in ``budget`` bytes; gate and up of the same
    experts follow each other.
    """
    plan = shape.plan(group[0])
    alone = [linear for linear in plan.linears if not is_routed(linear)]
    found = [[linear] for linear in alone]
    experts = [site.partition(".")[2] for site in plan.expert_sites]
    for kinds in (("gate", "up"), ("down",)) if experts else ():
        m, n = shape.linear_size(f"{kinds[0]}.{experts[0]}")
        count = max(1, budget // (8 * len(group) * (m * n + 2 * n * n)))
        for start in range(0, len(experts), count):
            found += [[f"{kind}.{expert}" for expert in experts[start : start + count]] for kind in kinds]
    return found
