"""Rounding as the checkpoint does it, bit for bit, with gradients that pass: the straight-through estimator (arXiv 1308.3432).

``rounding.py`` serves the training of transforms, where scales of activations are not settled yet; here they are, static ones too, so that
what is trained computes exactly what the stored model will.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..linear import Rounding


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


class StraightRounding(nn.Module):
    """``rounding`` while ``active``, the identity while not; its gradient is that of the identity either way."""

    def __init__(self, rounding: Rounding):
        super().__init__()
        self.rounding, self.active = rounding, False

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (*batch, tokens, n) -> the same shape and dtype."""
        return substituted(x, self.rounding(x.detach())) if self.active else x
