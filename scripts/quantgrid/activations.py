"""What calibration decides about the input of a site: its element among candidates, and the scales that stay fixed while the model runs.

A scale per tensor and a static global scale are taken from the extremes of the transformed statistics, so that a token's result never
depends on the tokens beside it; what exceeds them while the model runs saturates. Where a site has several candidates, the one of least
squared error on its token sample is taken: signed or unsigned FP4, for instance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .linear import Rounding
from .quantizer import QuantScheme, find_parameters
from .statistics import SiteStatistics


def fixed_parameters(statistics: SiteStatistics, scheme: QuantScheme) -> dict[str, Tensor]:
    """The parameters of ``scheme`` that calibration settles, by name: all, the ``global_scale`` alone, or none (:class:`Rounding`)."""
    if scheme.granularity != "tensor" and scheme.global_scale != "static":
        return {}
    # One row that holds both extremes of every channel: its blocks span whatever a token's block spans.
    extremes = torch.stack([statistics.minimum, statistics.maximum], -1).float().reshape(1, -1)
    seen = replace(scheme, group_size=scheme.group_size and 2 * scheme.group_size,
                   global_scale="tensor" if scheme.global_scale == "static" else scheme.global_scale)
    found = find_parameters(extremes, seen)
    parts = ("scale", "zero_point", "global_scale") if scheme.granularity == "tensor" else ("global_scale",)
    return {part: getattr(found, part) for part in parts if getattr(found, part) is not None}


def choose(candidates: Sequence[QuantScheme], statistics: SiteStatistics,
           clip: Mapping[str, Tensor] | None = None) -> tuple[Rounding, dict[str, float]]:
    """The candidate of least error with what calibration fixes of it, and the relative squared error of each on the token sample.

    The first of equals wins; a single candidate is taken as it is, without errors. ``clip``: learned limits of the ranges, of any candidate.
    """
    roundings = [Rounding(scheme, {**fixed_parameters(statistics, scheme), **(clip or {})}) for scheme in candidates]
    if len(roundings) == 1:
        return roundings[0], {}
    samples = statistics.samples.float()
    energy = samples.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    errors = [((rounding(samples) - samples).double().square().sum() / energy).item() for rounding in roundings]
    best = min(range(len(errors)), key=errors.__getitem__)
    return roundings[best], {scheme.element: error for scheme, error in zip(candidates, errors)}
