"""How the range of a block is found: the search against brute force, percentiles and clip ratios by hand."""

import math

import pytest
import torch

from quantgrid.quantizer import activation_scheme, fake_quantize, find_parameters, scheme
from quantgrid.ranges import block_ranges, shrink_factors
from test_quantizer import heavy_tailed


@pytest.mark.parametrize("key", ["int4", "int4_asym", "fp4", "nf4", "nvfp4", "mxfp4", "mxint4"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group-32"])
def test_the_search_equals_brute_force(key, granularity):
    x = heavy_tailed(3, 96)
    used = scheme(key, granularity=granularity, range="mse", mse_steps=20)
    plain = scheme(key, granularity=granularity)
    shape = (*used.scale_shape(x.shape), -1)
    global_scale = find_parameters(x, plain).global_scale
    errors = []
    for i in range(16):
        shrunk = plain if i == 0 else scheme(key, granularity=granularity, clip_ratio=1 - i / 20)
        values = fake_quantize(x, shrunk, find_parameters(x, shrunk, global_scale))
        errors.append((values - x).abs().double().pow(2.4).reshape(shape).sum(-1))
    found = (fake_quantize(x, used) - x).abs().double().pow(2.4).reshape(shape).sum(-1)
    best = torch.stack(errors).amin(0)
    assert (found <= best * (1 + 1e-4)).all() and (found >= best * (1 - 1e-4)).all()
    assert (found <= errors[0]).all()


def test_e8m0_search_tries_only_what_differs():
    assert shrink_factors(scheme("mxfp4", range="mse")) == [1, 0.5, 0.25, 1 - 79 / 100]
    assert len(shrink_factors(scheme("int4", range="mse"))) == 80


def test_percentile_is_the_nearest_rank():
    x = torch.arange(1.0, 101)[None]
    assert find_parameters(-x, scheme("int8", range="percentile", percentile=90)).scale.item() == pytest.approx(90 / 127)
    found = find_parameters(x - 50, scheme("int4_asym", range="percentile", percentile=90))
    assert found.scale.item() == pytest.approx((40 - -39) / 15)


def test_clip_ratio_scales_both_ends():
    x = torch.tensor([[-2.0, 4.0]])
    assert find_parameters(x, activation_scheme("int4", clip_ratio=0.5)).scale.item() == pytest.approx(3 / 15)
    assert find_parameters(x, scheme("int4", clip_ratio=0.5)).scale.item() == pytest.approx(2 / 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 15, 16, 24, 31, 32, 33, 48, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_are_the_plain_extremes_bit_for_bit(symmetric, size, dtype):
    """Whatever way is the fastest for a block's size: signed zeros, subnormals, infinities and NaN, and rows that do not lie next to each other."""
    used, blocks = scheme("int4" if symmetric else "int4_asym", group_size=size), heavy_tailed(12, 5 * size).to(dtype).unflatten(-1, (5, size))
    for row, value in enumerate((0.0, -0.0, torch.finfo(dtype).tiny / 4, -math.inf, math.inf, math.nan)):
        blocks[row, 2] = value
        blocks[row, 4, -1] = value
    plain = blocks.float() if dtype != torch.float64 else blocks
    for values, exact in ((blocks, plain), (blocks[::2], plain[::2]), (blocks.transpose(0, 1), plain.transpose(0, 1))):
        low, high = block_ranges(values, used)
        wanted = (None, exact.abs().amax(-1)) if symmetric else (exact.amin(-1).clamp(max=0), exact.amax(-1).clamp(min=0))
        assert torch.equal(high.view(torch.int32)[~high.isnan()], (wanted[1].float().abs()).view(torch.int32)[~high.isnan()])
        assert torch.equal(high.isnan(), exact.isnan().any(-1))
        assert (low is None) == symmetric and (symmetric or torch.equal(low[~low.isnan()], wanted[0].float()[~low.isnan()]))
