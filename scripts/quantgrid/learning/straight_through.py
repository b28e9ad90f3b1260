"""Rounding with gradients: the straight-through estimator (arXiv 1308.3432), with or without the range of each scale block.

Values are those of the library's quantizer, bit for bit. ``gradient`` names the derivative of x̂ = s c(x / s), codes c rounded straight through:

``range``     the scale s belongs to a range that is found at run time, so it is a function of x: dx̂ = dx + (x̂ - x) dw / w, with w the width of
              the block's range. Its first factor is LSQ's c - x / s (arXiv 1902.08153). The codes of OmniQuant, FlatQuant and OSTQuant leave
              the scale attached in this way. Rounding of the scale to its storage format passes straight through too, that of a power of
              two in the logarithm: s stays proportional to w.
``identity``  dx̂ = dx, as SpinQuant's code has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..linear import CLIP, Rounding
from ..quantizer import QuantScheme, fake_quantize
from ..ranges import clamp_ranges, percentile_rank


class _Substituted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, smooth: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def substituted(smooth: Tensor, exact: Tensor) -> Tensor:
    """The values of ``exact`` with the gradient of ``smooth``, of the same shape and dtype."""
    return _Substituted.apply(smooth, exact.detach())


def blocks_of(x: Tensor, scheme: QuantScheme) -> Tensor:
    """``x`` (*batch, rows, n) as (*, groups, size) with one scale per block."""
    shape = scheme.scale_shape(x.shape)
    return x.reshape(math.prod(shape[:-1]), shape[-1], -1)


def range_ends(blocks: Tensor, scheme: QuantScheme) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(magnitude, sign, place) of the elements that set the range of each block, each tensor (*, groups, 1).

    A symmetric range has one end, the largest magnitude; an asymmetric one has two, a positive and a negative, and contains 0.
    """
    sides = [blocks.abs()] if scheme.symmetric else [blocks, -blocks]
    found = []
    for number, side in enumerate(sides):
        if scheme.range == "percentile":
            magnitude, place = side.kthvalue(percentile_rank(scheme, side.shape[-1]), dim=-1, keepdim=True)
        else:
            magnitude, place = side.max(dim=-1, keepdim=True)
        sign = blocks.gather(-1, place).sign() if scheme.symmetric else torch.full_like(magnitude, 1.0 - 2.0 * number)
        found.append((magnitude.clamp(min=0), sign, place))
    return found


class _RangeRounded(torch.autograd.Function):
    """The values ``exact`` of ``x`` rounded in ``scheme``, with the gradient ``range``."""

    @staticmethod
    def forward(ctx, x: Tensor, exact: Tensor, scheme: QuantScheme) -> Tensor:
        ends = range_ends(blocks_of(x, scheme), scheme)
        width = sum(magnitude for magnitude, _, _ in ends)
        inverse = torch.where(width > 0, 1 / width, 0.0)
        weights = [torch.where(magnitude > 0, sign, 0.0) * inverse for magnitude, sign, _ in ends]
        ctx.scheme = scheme
        ctx.save_for_backward(exact - x, *weights, *(place for _, _, place in ends))
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        error, *ends = ctx.saved_tensors
        found = blocks_of(gradient, ctx.scheme).clone()
        moved = (found * blocks_of(error, ctx.scheme)).sum(-1, keepdim=True)  # dL / d(log w)
        for weight, place in zip(ends[: len(ends) // 2], ends[len(ends) // 2 :]):
            found.scatter_add_(-1, place, moved * weight)
        return found.view(gradient.shape), None, None


def straight_through(x: Tensor, exact: Tensor, scheme: QuantScheme, gradient: str = "range") -> Tensor:
    """The values ``exact`` of ``x`` (*batch, rows, n) rounded in ``scheme``, differentiable in ``x`` as ``gradient`` says."""
    if gradient == "identity":
        return substituted(x, exact)
    return _RangeRounded.apply(x, exact.detach(), scheme)


def dynamic(scheme: QuantScheme) -> QuantScheme:
    """``scheme`` with ranges by extremes, and with a global scale of the tensor at hand in the place of a static one."""
    scheme = replace(scheme, range="minmax") if scheme.range != "minmax" else scheme
    return replace(scheme, global_scale="tensor") if scheme.global_scale == "static" else scheme


class StraightThrough(nn.Module):
    """Rounds an activation while a transform is trained, of several candidate schemes in the one of least squared error.

    Scales are found on the tensor at hand, static ones too: the statistics of the finished transform settle a static scale.
    ``clip``: learned limits of its ranges (``linear.Rounding``), which gradients reach.
    """

    def __init__(self, candidates: Sequence[QuantScheme], gradient: str = "range", clip: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.candidates, self.gradient, self.clip = [dynamic(scheme) for scheme in candidates], gradient, clip

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (*batch, tokens, n) -> the same shape and dtype."""
        inputs = [self._clipped(x, scheme) for scheme in self.candidates]
        with torch.no_grad():
            rounded = [fake_quantize(values, scheme) for values, scheme in zip(inputs, self.candidates)]
            errors = [0.0] if len(rounded) == 1 else [(values - x).square().sum().item() for values in rounded]
        best = min(range(len(errors)), key=errors.__getitem__)
        return straight_through(inputs[best], rounded[best], self.candidates[best], self.gradient)

    def _clipped(self, x: Tensor, scheme: QuantScheme) -> Tensor:
        if self.clip is None:
            return x
        low, high = (self.clip[end] for end in CLIP)
        return clamp_ranges(x, low, high, scheme.group_size or x.shape[-1], scheme.symmetric)


def round_weight(weight: Tensor, scheme: QuantScheme, gradient: str = "range") -> Tensor:
    """``weight`` (m, n) rounded with ranges by extremes, differentiable."""
    scheme = dynamic(scheme)
    with torch.no_grad():
        exact = fake_quantize(weight, scheme)
    return straight_through(weight, exact, scheme, gradient)


class StraightRounding(nn.Module):
    """``rounding`` of the stored model while ``active``, the identity while not.

    A range that calibration settled is no function of the input: its gradient is the identity's.
    """

    def __init__(self, rounding: Rounding, gradient: str = "range"):
        super().__init__()
        self.rounding, self.gradient, self.active = rounding, gradient, False

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (*batch, tokens, n) -> the same shape and dtype."""
        if not self.active:
            return x
        gradient = "identity" if "scale" in self.rounding.fixed else self.gradient
        x = self.rounding.clip(x)
        return straight_through(x, self.rounding.round(x.detach()), self.rounding.scheme, gradient)
