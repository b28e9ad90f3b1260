"""Calibrated parameters of site inputs: element choice and fixed scales.

Per-tensor scales and static global scales come from the extremes of the transformed statistics, so
that the result of a token never depends on other tokens in its batch; values beyond them saturate
at run time. For a site with several candidate elements (for instance signed and unsigned FP4) the
one of least squared error on its token sample is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..calibration.statistics import SiteStatistics
from ..quantizer.tensors import find_parameters
from ..schemes.quant_scheme import QuantScheme
from .linear import Rounding


def fixed_parameters(statistics: SiteStatistics, scheme: QuantScheme) -> dict[str, Tensor]:
    """Parameters of ``scheme`` fixed by calibration, by name.

    All of them, the ``global_scale`` alone, or none (:class:`Rounding`).
    """
    if scheme.granularity != "tensor" and scheme.global_scale != "static":
        return {}
    # One row with both extremes of every channel: its blocks span at least the range of any token's
    # block.
    extremes = torch.stack([statistics.minimum, statistics.maximum], -1).float().reshape(1, -1)
    seen = replace(
        scheme,
        group_size=scheme.group_size and 2 * scheme.group_size,
        global_scale="tensor" if scheme.global_scale == "static" else scheme.global_scale,
    )
    found = find_parameters(extremes, seen)
    parts = ("scale", "zero_point", "global_scale") if scheme.granularity == "tensor" else ("global_scale",)
    return {part: getattr(found, part) for part in parts if getattr(found, part) is not None}


def choose(
    candidates: Sequence[QuantScheme], statistics: SiteStatistics, clip: Mapping[str, Tensor] | None = None
) -> tuple[Rounding, dict[str, float]]:
    """Candidate of least error with its fixed parameters, and the relative squared error of each.

    Errors are measured on the token sample. Ties go to the first; a single candidate is taken
    without errors. ``clip``: learned range limits, for any candidate.
    """
    roundings = [Rounding(scheme, {**fixed_parameters(statistics, scheme), **(clip or {})}) for scheme in candidates]
    if len(roundings) == 1:
        return roundings[0], {}
    samples = statistics.samples.float()
    energy = samples.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    errors = [((rounding(samples) - samples).double().square().sum() / energy).item() for rounding in roundings]
    best = min(range(len(errors)), key=errors.__getitem__)
    return roundings[best], {scheme.element: error for scheme, error in zip(candidates, errors)}
