"""Differentiable rounding: straight-through estimator (arXiv 1308.3432), with optional range
gradient.

Values equal those of the library's quantizer, bit for bit. ``gradient`` selects the derivative of
x̂ = s c(x / s), codes c rounded straight through:

``range``     the scale s belongs to a range computed at run time, so it is a function of x:
              dx̂ = dx + (x̂ - x) dw / w, with w the width of the block's range. Its first factor
              is LSQ's c - x / s (arXiv 1902.08153). The codes of OmniQuant, FlatQuant and
              OSTQuant keep the scale in the graph in this way. Rounding of the scale to its
              storage format passes straight through too, for a power of two in the logarithm:
              s stays proportional to w.
``identity``  dx̂ = dx, as in SpinQuant's code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..inference.linear import CLIP, Rounding
from ..quantizer.ranges import clamp_ranges, percentile_rank
from ..quantizer.tensors import fake_quantize
from ..schemes.quant_scheme import QuantScheme


class _Substituted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, smooth: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def substituted(smooth: Tensor, exact: Tensor) -> Tensor:
    """Values of ``exact`` with the gradient of ``smooth``, both of the same shape and dtype."""
    return _Substituted.apply(smooth, exact.detach())


def blocks_of(x: Tensor, scheme: QuantScheme) -> Tensor:
    """Reshape ``x`` (*batch, rows, n) to (*, groups, size) with one scale per block."""
    shape = scheme.scale_shape(x.shape)
    return x.reshape(math.prod(shape[:-1]), shape[-1], -1)


def range_ends(x: Tensor, scheme: QuantScheme) -> list[tuple[Tensor, Tensor]]:
    """(derivative, position) of the elements that set the range of each block, (*, groups, 1) each.

    ``x`` (*batch, rows, n); the derivative is that of the logarithm of the range's width.

    A symmetric range has one end, the largest magnitude; an asymmetric one has two, a positive and
    a negative, and contains 0.
    """
    blocks = blocks_of(x, scheme)
    sides = [blocks.abs()] if scheme.symmetric else [blocks, -blocks]
    found = []
    for number, side in enumerate(sides):
        if scheme.range == "percentile":
            magnitude, place = side.kthvalue(percentile_rank(scheme, side.shape[-1]), dim=-1, keepdim=True)
        else:
            magnitude, place = side.max(dim=-1, keepdim=True)
        sign = blocks.gather(-1, place).sign() if scheme.symmetric else torch.full_like(magnitude, 1.0 - 2.0 * number)
        found.append((magnitude.clamp(min=0), sign, place))
    width = sum(magnitude for magnitude, _, _ in found)
    inverse = torch.where(width > 0, 1 / width, 0.0)
    return [(torch.where(magnitude > 0, sign, 0.0) * inverse, place) for magnitude, sign, place in found]


class _RangeRounded(torch.autograd.Function):
    """Values ``exact`` of ``x`` rounded in ``scheme``, with the gradient ``range``."""

    @staticmethod
    def forward(ctx, x: Tensor, exact: Tensor, scheme: QuantScheme) -> Tensor:
        ctx.scheme = scheme
        ctx.save_for_backward(exact - x, *(part for end in range_ends(x, scheme) for part in end))
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        error, *ends = ctx.saved_tensors
        found = blocks_of(gradient, ctx.scheme).clone()
        moved = (found * blocks_of(error, ctx.scheme)).sum(-1, keepdim=True)  # dL / d(log w)
        for derivative, place in zip(ends[::2], ends[1::2]):
            found.scatter_add_(-1, place, moved * derivative)
        return found.view(gradient.shape), None, None


def straight_through(x: Tensor, exact: Tensor, scheme: QuantScheme, gradient: str = "range") -> Tensor:
    """Values ``exact`` of ``x`` (*batch, rows, n) rounded in ``scheme``, differentiable in ``x``.

    ``gradient`` selects the derivative.
    """
    if gradient == "identity":
        return substituted(x, exact)
    return _RangeRounded.apply(x, exact.detach(), scheme)


def dynamic(scheme: QuantScheme) -> QuantScheme:
    """``scheme`` with min-max ranges, and a per-tensor global scale instead of a given one."""
    scheme = replace(scheme, range="minmax") if scheme.range != "minmax" else scheme
    return replace(scheme, global_scale="tensor") if scheme.global_scale in ("static", "site") else scheme


class StraightThrough(nn.Module):
    """Rounding of an activation during training, in the best of several candidate schemes.

    The best has the least squared error. Scales are computed from the tensor, static ones too: the
    statistics of the finished transform determine the final static scale. ``clip``: learned range
    limits (``linear.Rounding``), which receive gradients.
    """

    def __init__(
        self, candidates: Sequence[QuantScheme], gradient: str = "range", clip: Mapping[str, Tensor] | None = None
    ):
        super().__init__()
        self.candidates, self.gradient, self.clip = [dynamic(scheme) for scheme in candidates], gradient, clip

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x`` (*batch, tokens, n); shape and dtype are unchanged."""
        return straight_through(*self.best(x), self.gradient)

    def best(self, x: Tensor) -> tuple[Tensor, Tensor, QuantScheme]:
        """Clip and round ``x``; returns the clipped values, the rounded ones, and their scheme."""
        inputs = [self._clipped(x, scheme) for scheme in self.candidates]
        with torch.no_grad():
            rounded = [fake_quantize(values, scheme) for values, scheme in zip(inputs, self.candidates)]
            errors = [0.0] if len(rounded) == 1 else [(values - x).square().sum().item() for values in rounded]
        best = min(range(len(errors)), key=errors.__getitem__)
        return inputs[best], rounded[best], self.candidates[best]

    def _clipped(self, x: Tensor, scheme: QuantScheme) -> Tensor:
        if self.clip is None:
            return x
        low, high = (self.clip[end] for end in CLIP)
        return clamp_ranges(x, low, high, scheme.group_size or x.shape[-1], scheme.symmetric)


def round_weight(weight: Tensor, scheme: QuantScheme, gradient: str = "range") -> Tensor:
    """``weight`` (m, n) rounded with min-max ranges, differentiable."""
    scheme = dynamic(scheme)
    with torch.no_grad():
        exact = fake_quantize(weight, scheme)
    return straight_through(weight, exact, scheme, gradient)


class StraightRounding(nn.Module):
    """``rounding`` of the stored model while ``active``, otherwise the identity.

    A calibrated range does not depend on the input, so its gradient is that of the identity.
    """

    def __init__(self, rounding: Rounding, gradient: str = "range"):
        super().__init__()
        self.rounding, self.gradient, self.active = rounding, gradient, False

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x`` (*batch, tokens, n); shape and dtype are unchanged."""
        if not self.active:
            return x
        gradient = "identity" if "scale" in self.rounding.fixed else self.gradient
        x = self.rounding.clip(x)
        return straight_through(x, self.rounding.round(x.detach()), self.rounding.scheme, gradient)
