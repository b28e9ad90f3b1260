"""Global scales that several linears share (``global_scale: site``), from the transformed weights.

Servers fuse the linears that read one input (q, k and v; gate and up) into one linear with one global
scale. Each expert has its own gate and up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..calibration.layers import DecoderLayer
from ..models.plans import LayerPlan, is_in_mixture
from ..quantizer.tensors import find_parameters
from ..schemes.cell_schemes import CellSchemes

_SEARCHED = ("mse", "exhaustive")  # ranges that leave the global scale as it is


def fused_linears(plan: LayerPlan) -> Iterator[list[str]]:
    """Groups of linears that share an input: those of a site, of an expert if it has experts."""
    for site in plan.sites.values():
        groups: dict[str, list[str]] = {}
        for linear in site.linears:
            expert = linear.partition(".")[2] if is_in_mixture(linear) else ""
            groups.setdefault(expert, []).append(linear)
        yield from groups.values()


def clipped_weight(layer: DecoderLayer, linear: str) -> Tensor:
    """Weight (m, n) of ``linear`` in float32, within its learned limits."""
    weight, clip = layer.weights[linear].float(), layer.clips.get(linear)
    return clip(weight) if clip else weight


def shared_global_scales(layer: DecoderLayer, schemes: CellSchemes) -> dict[str, Tensor]:
    """Rounded linear -> the largest global scale (1, 1) of its group (:func:`fused_linears`).

    Linears whose scheme does not share global scales by site are absent. Those of a group have one scheme.
    """
    found: dict[str, Tensor] = {}
    for group in fused_linears(layer.plan):
        schemes_of = {linear: schemes.weight_of(layer.index, linear) for linear in group}
        rounded = [linear for linear, scheme in schemes_of.items() if scheme and scheme.global_scale == "site"]
        if not rounded:
            continue
        scheme = schemes_of[rounded[0]]
        alone = replace(scheme.separate, range="minmax" if scheme.range in _SEARCHED else scheme.range)
        scales = [find_parameters(clipped_weight(layer, linear), alone).global_scale for linear in rounded]
        found |= dict.fromkeys(rounded, torch.stack(scales).amax(0))
    return found
