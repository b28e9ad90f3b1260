"""Quantization error and bits of one linear: relative squared errors of weight and output.

Output errors are computed for exact inputs from the second moment, and for rounded inputs on the
token sample of the site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.layers import DecoderLayer
from ..calibration.statistics import SiteStatistics, stack
from ..inference.linear import Rounding
from ..linalg.quadratic import output_square
from ..quantizer.quantized_weight import Compensated
from ..schemes.quant_scheme import QuantScheme
from .compensation_storage import side_bits

Roundings = dict[str, Rounding]  # by site, of one layer


@dataclass(frozen=True)
class Site:
    """Inputs of linears that are solved together: stacked statistics, and the token samples rounded
    (linears, tokens, n)."""

    statistics: SiteStatistics
    rounded: Tensor

    @classmethod
    def of(cls, sites: Sequence[tuple[DecoderLayer, Roundings, str]]) -> Site:
        """Inputs at ``sites``: a layer, the roundings of its inputs, and the name of a site."""
        found = [layer.statistics[site] for layer, _, site in sites]
        samples = [statistics.samples.float() for statistics in found]
        rounded = [
            roundings[site](tokens) if site in roundings else tokens
            for tokens, (_, roundings, site) in zip(samples, sites)
        ]
        return cls(stack(found), torch.stack(rounded))


def measure(weight: Tensor, solved: Compensated, site: Site) -> dict[str, list[float]]:
    """Relative squared errors per layer of ``weight`` (layers, m, n) and of the output.

    The output error is computed for exact inputs (from the second moment) and for rounded inputs
    (on the token sample).
    """
    statistics = site.statistics
    layers = zip(
        weight,
        solved.dequantized(),
        statistics.second_moment,
        statistics.samples,
        site.rounded,
        _exact_branches(solved, len(weight)),
    )
    found = [_layer_errors(*layer) for layer in layers]
    return {name: [errors[name] for errors in found] for name in found[0]}


def _exact_branches(solved: Compensated, layers: int) -> list[Tensor | None]:
    """Low-rank term (m, n) per layer if it reads unrounded inputs, else None."""
    if solved.low_rank is None or solved.branch_input == "quantized":
        return [None] * layers
    left, right = solved.low_rank
    return list(left.float() @ right.float())


def _layer_errors(
    weight: Tensor, used: Tensor, moment: Tensor, samples: Tensor, rounded: Tensor, branch: Tensor | None
) -> dict[str, float]:
    """Errors of one layer; ``used`` is the effective weight (m, n), ``branch`` its part on exact
    inputs."""
    error, moment, samples = weight - used, moment.float(), samples.float()
    wanted = samples @ weight.mT
    joint = rounded @ used.mT - wanted
    if branch is not None:
        joint += (samples - rounded) @ branch.mT
    return {
        "weight_error": ratio(error.square().sum(), weight.square().sum()),
        "output_error": ratio(output_square(error, moment), output_square(weight, moment)),
        "joint_output_error": ratio(joint.square().sum(), wanted.square().sum()),
    }


def ratio(part: Tensor, whole: Tensor) -> float:
    """``part`` relative to ``whole``, in float64; 0 where ``whole`` is 0."""
    return (part.double() / whole.double()).item() if whole > 0 else 0.0


def accounted_bits(solved: Compensated, scheme: QuantScheme) -> dict[str, float]:
    """Bits per weight of one linear.

    ``bits`` follows the paper: float32 scales unless the format fixes them, no zero points of the
    codes; low-rank factors, outliers and residual columns, with their zero points, as stored.
    ``stored_bits`` is the size in the checkpoint.
    """
    shape = tuple(solved.quantized.codes.shape[-2:])
    zero_points = scheme.zero_point_bits * math.prod(scheme.scale_shape(shape)) / math.prod(shape)
    stored = scheme.bits_per_element(shape) + side_bits(solved)
    return {"bits": stored - zero_points, "stored_bits": stored}
