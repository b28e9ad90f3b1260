"""Rounding that gradients pass: the straight-through estimator (arXiv 1308.3432) around the quantizer of the library.

While a transform is trained, activations find their scales on the tensor at hand, static ones too: a static scale is settled by the
statistics of the finished transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..quantizer import QuantScheme, fake_quantize


def dynamic(scheme: QuantScheme) -> QuantScheme:
    """``scheme`` with ranges by extremes, and with a global scale of the tensor at hand in the place of a static one."""
    scheme = replace(scheme, range="minmax") if scheme.range != "minmax" else scheme
    return replace(scheme, global_scale="tensor") if scheme.global_scale == "static" else scheme


class StraightThrough(nn.Module):
    """Rounds an activation in the scheme, of several candidates in the one of least squared error; its gradient is that of the identity."""

    def __init__(self, candidates: Sequence[QuantScheme]):
        super().__init__()
        self.candidates = [dynamic(scheme) for scheme in candidates]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            rounded = [fake_quantize(x, scheme) for scheme in self.candidates]
            best = rounded[0] if len(rounded) == 1 else min(rounded, key=lambda values: (values - x).square().sum().item())
            error = best - x
        return x + error


def span(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """Width of the range of every scale block of ``weight`` (m, n), repeated over its elements; differentiable."""
    blocks = weight.unflatten(-1, (-1, scheme.group_size or weight.shape[-1]))
    blocks = blocks.flatten(-2).flatten()[None, None] if scheme.granularity == "tensor" else blocks
    width = blocks.abs().amax(-1, keepdim=True) if scheme.symmetric else blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)
    return width.expand_as(blocks).reshape(weight.shape).clamp(min=torch.finfo(weight.dtype).tiny)


def round_weight(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """``weight`` (m, n) rounded; the error grows with the range of its block, so that gradients reach what limits this range.

    For W = s c with codes c fixed the derivative with respect to the scale s is c minus W / s, as in arXiv 1902.08153.
    """
    with torch.no_grad():
        error = fake_quantize(weight, dynamic(scheme)) - weight
    width = span(weight, scheme)
    return weight + error * (width / width.detach())
