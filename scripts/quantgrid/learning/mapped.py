"""Rounding of a site's input between a map and its inverse: z = Q(x T) T⁻¹; weights unchanged.

With the error e = Q(u) - u at u = x T this is z = x + e T⁻¹, because T T⁻¹ is the identity for all
parameters. The straight-through part of the gradient needs no product. The error depends on u only
through the width w of each scale block's range, i.e. on the elements at its ends. The gradients,
given the gradient g of z:

T⁻¹   eᵀ g
x     g + S Tᵀ    S is dL/d(log w) d(log w)/du: nonzero only at the ends of ranges, and zero with
                  ``gradient: identity``
T     xᵀ S

This takes one product of all tokens with a matrix; differentiating both maps takes 4. dL/d(log w)
takes a second product if a token has several scale blocks. For a rotation the gradient differs from
that of both maps only in its component normal to the orthogonal group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..inference.input_maps import InputMap, StepMap
from ..inference.linear import SiteInput
from .straight_through import StraightThrough, blocks_of, range_ends


def _times(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply runs of k channels of ``x`` (..., n) by blocks of ``matrices`` (blocks, k, k)."""
    return torch.einsum("...gqi,gij->...gqj", _runs(x, matrices), matrices).flatten(-3)


def _runs(x: Tensor, matrices: Tensor) -> Tensor:
    """Split the channels of ``x`` (..., n) into (..., blocks, runs of a block, k)."""
    return x.unflatten(-1, (len(matrices), -1, matrices.shape[-1]))


def _sparse_product(rows: Tensor, columns: Tensor, values: Tensor, count: int, matrix: Tensor) -> Tensor:
    """Multiply the sparse (count, m) of ``values`` at ``rows`` and ``columns`` by ``matrix``.

    The three have shape (entries,), ``matrix`` (m, k).
    """
    order = rows.argsort()
    starts = torch.searchsorted(rows[order], torch.arange(count, device=rows.device))
    return embedding_bag(columns[order], matrix, starts, mode="sum", per_sample_weights=values[order])


class _RoundedBetween(torch.autograd.Function):
    """Q(x T) T⁻¹ for ``x`` (..., tokens, n), ``forward`` T and ``inverse`` T⁻¹ (blocks, k, k)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Tensor, inverse: Tensor, rounding: StraightThrough) -> Tensor:
        mapped = _times(x, forward)
        _, exact, scheme = rounding.best(mapped)
        error = exact - mapped
        change = _times(error, inverse)
        ends = range_ends(mapped, scheme) if rounding.gradient == "range" else []
        whole = scheme.scale_shape(x.shape)[-1] == 1
        ctx.scheme, ctx.whole = scheme, whole
        kept = change if whole and ends else None
        ctx.save_for_backward(x, forward, inverse, error, kept, *(part for end in ends for part in end))
        return x + change

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        x, forward, inverse, error, change, *ends = ctx.saved_tensors
        to_inverse = torch.einsum("...gqi,...gqj->gij", _runs(error, inverse), _runs(gradient, inverse))
        if not ends:
            return gradient, None, to_inverse, None
        moved = gradient * change if ctx.whole else _times(gradient, inverse.mT) * error
        moved = blocks_of(moved, ctx.scheme).sum(-1, keepdim=True)  # dL / d(log w)
        first = torch.arange(moved.numel(), device=x.device).view_as(moved) * (x.numel() // moved.numel())
        places = torch.cat([(first + place).flatten() for place in ends[1::2]])
        values = torch.cat([(moved * derivative).flatten() for derivative in ends[::2]])
        blocks, k = forward.shape[:2]
        runs, inner = places // k, places % k
        columns = runs % (x.shape[-1] // k) // (x.shape[-1] // k // blocks) * k + inner
        to_x = _sparse_product(runs, columns, values, x.numel() // k, forward.mT.reshape(-1, k))
        to_forward = _sparse_product(columns, runs, values, blocks * k, x.reshape(-1, k))
        return gradient + to_x.view_as(x), to_forward.view_as(forward).mT, to_inverse, None


def rounded_between(x: Tensor, input_map: InputMap, rounding: StraightThrough) -> Tensor:
    """Map ``x`` (*batch, tokens, n), round it and map it back."""
    if not isinstance(input_map, StepMap):
        return _RoundedBetween.apply(x, input_map.forward, input_map.inverse, rounding)
    for forward, _ in input_map.steps:
        x = forward(x)
    x = rounding(x)
    for _, inverse in reversed(input_map.steps):
        x = inverse(x)
    return x


class MappedInput(SiteInput):
    """Site input rounded between ``input_map`` and its inverse; unchanged weights."""

    def __init__(
        self,
        online: list[dict[str, Any]],
        rounding: StraightThrough | None,
        consumers: int,
        input_map: InputMap,
    ):
        super().__init__(online, rounding, consumers)
        self.input_map = input_map

    def round(self, x: Tensor) -> Tensor:
        if self.rounding is None or self.input_map.is_empty:
            return super().round(x)
        # a bfloat16 rotation would not be orthogonal
        with torch.autocast(x.device.type, enabled=False):
            return rounded_between(x.float(), self.input_map, self.rounding).to(x.dtype)
