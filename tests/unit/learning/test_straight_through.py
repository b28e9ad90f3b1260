"""Rounding with gradients: values of the quantizer to the last bit, gradients of the range found at
run time and of learned clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantgrid.inference.linear import Rounding
from quantgrid.learning.straight_through import StraightRounding, StraightThrough, round_weight, straight_through
from quantgrid.quantizer import fake_quantize, find_parameters
from quantgrid.schemes import activation_scheme, scheme
from reference_statistics import close


def test_rounding_lets_gradients_through():
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = activation_scheme("int4")
    rounded = StraightThrough([found], "identity")(x)
    assert torch.equal(rounded.detach(), fake_quantize(x.detach(), found))
    rounded.backward(torch.arange(480.0).view_as(x))
    assert torch.equal(x.grad, torch.arange(480.0).view_as(x))


RANGES = {
    "int4 per token": activation_scheme("int4"),
    "symmetric per token": activation_scheme("int4_sym"),
    "groups": activation_scheme("int4", granularity="group-16"),
    "tensor": activation_scheme("int4", granularity="tensor"),
    "mxfp4": activation_scheme("mxfp4"),
    "nvfp4": activation_scheme("nvfp4"),
    "percentile": activation_scheme("int4", range="percentile", percentile=90.0),
}


@pytest.mark.parametrize("name", RANGES)
def test_the_gradient_reaches_the_range_found_at_run_time(name):
    """Against differences of x + e w(x) / w with the error e held, in float64 and by a width
    computed here."""
    found = RANGES[name]
    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.2
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def width(values: Tensor) -> Tensor:
        rows = values.flatten(-2)[:, None, :] if found.granularity == "tensor" else values
        blocks = rows.unflatten(-1, (-1, found.group_size or rows.shape[-1]))
        ordered = blocks.sort(-1).values
        last = math.ceil(found.percentile / 100 * blocks.shape[-1]) if found.range == "percentile" else blocks.shape[-1]
        wide = (
            blocks.abs().amax(-1)
            if found.symmetric
            else ordered[..., last - 1].clamp(min=0) - ordered[..., -last].clamp(max=0)
        )
        return wide[..., None].expand_as(blocks).reshape(values.shape)

    exact = fake_quantize(x, found)

    def smooth(values: Tensor) -> float:
        return (upstream * (values + (exact - x) * width(values) / width(x))).sum().item()

    leaf = x.clone().requires_grad_()
    rounded = straight_through(leaf, exact, found)
    assert torch.equal(rounded.detach(), exact)
    rounded.backward(upstream)
    wanted, step = torch.empty_like(x), 1e-6
    for place in range(x.numel()):
        moved = torch.zeros(x.numel(), dtype=torch.float64)
        moved[place] = step
        wanted.view(-1)[place] = (smooth(x + moved.view_as(x)) - smooth(x - moved.view_as(x))) / (2 * step)
    assert close(leaf.grad, wanted, 1e-6) and not close(leaf.grad, upstream, 1e-2)


def test_a_range_that_calibration_settled_has_no_gradient():
    found = activation_scheme("int8", granularity="tensor")
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    fixed = find_parameters(x, found)
    rounding = StraightRounding(Rounding(found, {"scale": fixed.scale, "zero_point": fixed.zero_point}))
    rounding.active = True
    leaf = x.clone().requires_grad_()
    rounding(leaf).backward(torch.ones_like(x))
    assert torch.equal(leaf.grad, torch.ones_like(x))


def test_gradients_reach_the_clipping_of_inputs():
    """Lowering a ratio below 1 lowers the end of each token's range: d/d(ratio) of the rounded
    values, by differences of the clipped ones."""
    found = activation_scheme("int8")
    x = torch.randn(6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clip = {end: torch.tensor(0.7, dtype=torch.float64, requires_grad=True) for end in ("clip_low", "clip_high")}
    rounded = StraightThrough([found], clip=clip)(x)
    assert (rounded.detach().amax(-1) - 0.7 * x.amax(-1)).abs().max() < 0.02 and (
        rounded.detach().amin(-1) - 0.7 * x.amin(-1)
    ).abs().max() < 0.02
    rounded.sum().backward()
    inside = (x > 0.7 * x.amin(-1, keepdim=True)) & (x < 0.7 * x.amax(-1, keepdim=True))
    above = ((~inside & (x > 0)) * x.amax(-1, keepdim=True)).sum()
    assert clip["clip_high"].grad.item() == pytest.approx(above.item(), rel=0.2) and clip["clip_low"].grad < 0


def test_of_several_candidates_the_closest_is_taken():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    candidates = [activation_scheme("int4"), activation_scheme("int8")]
    assert close(StraightThrough(candidates)(x), fake_quantize(x, candidates[1]), 1e-6)
    static = activation_scheme("nvfp4", global_scale="static")
    assert torch.isfinite(StraightThrough([static])(x)).all()


def test_the_gradient_of_a_rounded_weight_reaches_its_scale():
    """d/ds of s round(w / s) is round(w / s) - w / s inside the range: the learned-step-size
    gradient, here through the row's maximum."""
    found = scheme("int4_sym")
    w = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w[:, 0] = 4.0
    bound = torch.full((6, 1), 3.5, dtype=torch.float64, requires_grad=True)
    clipped = torch.where(w > bound, bound, torch.where(w < -bound, -bound, w))
    rounded = round_weight(clipped, found)
    assert close(rounded.detach(), fake_quantize(clipped.detach(), found), 1e-12)
    upstream = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rounded.backward(upstream)
    scale = 3.5 / 7
    codes = (rounded / scale).detach()
    inside = w.abs() < 3.5
    derivative = torch.where(inside, codes - w / scale, codes) / 7
    assert close(bound.grad, (upstream * derivative).sum(1, keepdim=True), 1e-6)
