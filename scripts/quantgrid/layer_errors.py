"""What rounding one linear costs: relative squared errors of weight and output, and bits.

Errors of the output are taken for exact inputs from the second moment, and for rounded ones on the token sample of the site.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .compensation_storage import side_bits
from .decoders import DecoderLayer
from .linear import Rounding
from .mitigations.compensated import Compensated
from .quantizer import QuantScheme
from .statistics import SiteStatistics, stack

Roundings = dict[str, Rounding]  # by site, of one layer
BLOCK = 192  # columns multiplied at a time (measured: 128 and 256 take 2 to 10 % longer)


@dataclass(frozen=True)
class Site:
    """A site of several layers: stacked statistics, and the token sample as the running model would round it (layers, tokens, n)."""

    statistics: SiteStatistics
    rounded: Tensor

    @classmethod
    def of(cls, layers: list[DecoderLayer], roundings: list[Roundings], site: str) -> Site:
        found = [layer.statistics[site] for layer in layers]
        samples = [statistics.samples.float() for statistics in found]
        rounded = [of_layer[site](tokens) if site in of_layer else tokens for tokens, of_layer in zip(samples, roundings)]
        return cls(stack(found), torch.stack(rounded))


def measure(weight: Tensor, solved: Compensated, site: Site) -> dict[str, list[float]]:
    """Relative squared errors per layer: of the weight, of the output for exact inputs (from the second moment), and of the output
    with the input rounded as well (on the token sample). ``weight`` (layers, m, n)."""
    statistics = site.statistics
    layers = zip(weight, solved.dequantized(), statistics.second_moment, statistics.samples, site.rounded, _exact_branches(solved, len(weight)))
    found = [_layer_errors(*layer) for layer in layers]
    return {name: [errors[name] for errors in found] for name in found[0]}


def _exact_branches(solved: Compensated, layers: int) -> list[Tensor | None]:
    """Per layer the low-rank term (m, n) that is fed with inputs that are not rounded, None where there is none."""
    if solved.low_rank is None or solved.branch_input == "quantized":
        return [None] * layers
    left, right = solved.low_rank
    return list(left.float() @ right.float())


def _layer_errors(weight: Tensor, used: Tensor, moment: Tensor, samples: Tensor, rounded: Tensor, branch: Tensor | None) -> dict[str, float]:
    """The measures of one layer; ``used`` is the weight (m, n) that the model computes with, its part ``branch`` on exact inputs."""
    error, moment, samples = weight - used, moment.float(), samples.float()
    wanted = samples @ weight.mT
    joint = rounded @ used.mT - wanted
    if branch is not None:
        joint += (samples - rounded) @ branch.mT
    return {"weight_error": ratio(error.square().sum(), weight.square().sum()),
            "output_error": ratio(output_square(error, moment), output_square(weight, moment)),
            "joint_output_error": ratio(joint.square().sum(), wanted.square().sum())}


def output_square(weight: Tensor, moment: Tensor) -> Tensor:
    """tr(W C Wᵀ), the mean squared norm of W x: ``weight`` (m, n), ``moment`` C (n, n) symmetric.

    Of the blocks of C off its diagonal only those above it are multiplied, and count twice: little more than half of W C.
    """
    found = weight.new_zeros(())
    for start in range(0, weight.shape[-1], BLOCK):
        block = slice(start, start + BLOCK)
        part = weight[:, block] @ moment[block, block]
        if start:
            part.addmm_(weight[:, :start], moment[:start, block], alpha=2)
        found += (part * weight[:, block]).sum()
    return found


def ratio(part: Tensor, whole: Tensor) -> float:
    """``part`` relative to ``whole``, in float64; 0 where there is nothing to err in."""
    return (part.double() / whole.double()).item() if whole > 0 else 0.0


def accounted_bits(solved: Compensated, scheme: QuantScheme) -> dict[str, float]:
    """Bits per weight of one linear: ``bits`` as the paper counts (float32 scales where a format does not fix them, no zero points,
    low-rank factors and outliers as they are stored), ``stored_bits`` as the checkpoint holds it."""
    shape = tuple(solved.quantized.codes.shape[-2:])
    zero_points = scheme.zero_point_bits * math.prod(scheme.scale_shape(shape)) / math.prod(shape)
    stored = scheme.bits_per_element(shape) + side_bits(solved)
    return {"bits": stored - zero_points, "stored_bits": stored}
