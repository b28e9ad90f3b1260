"""Range estimation of blocks: the search against brute force, percentiles and clip ratios by
hand."""

import math

import pytest
import torch
from test_scale_search import every_code

from quantgrid.quantizer import QuantizationParameters, fake_quantize, find_parameters, ranges
from quantgrid.quantizer.ranges import block_ranges, shrink_factors, whole
from quantgrid.quantizer.scales import load_scale
from quantgrid.schemes import PRESETS, QuantScheme, activation_scheme, scheme
from quantgrid.schemes.number_formats import SCALE_FORMATS
from quantgrid.schemes.scheme_checks import E8M0_RULES
from quantizer_cases import computed, heavy_tailed


def covering(x, plain, global_scale):
    """``x`` rounded with the smallest of all scales that cover each block of a symmetric scheme;
    None where scales are as fine as float32."""
    if plain.storage.bits > 8 or not plain.symmetric:
        return None
    peak, codes = x.abs().reshape(*plain.scale_shape(x.shape), -1).amax(-1), every_code(plain.scale_format)
    reach = load_scale(codes, plain.storage) * plain.limit * plain.scale_multiplier
    reach = reach.expand(*peak.shape, -1) * (1.0 if global_scale is None else global_scale.unsqueeze(-1))
    position = (reach < peak.unsqueeze(-1) * (1 - 1e-6)).sum(-1).clamp(max=len(codes) - 1)
    return fake_quantize(x, plain, QuantizationParameters(codes[position], None, global_scale))


def summed(values, x, used):
    """Sum of |x - values|**2.4 of every block, without its trimmed shares of the smallest and largest."""
    errors = (values - x).abs().double().pow(2.4).reshape(*used.scale_shape(x.shape), -1).sort(-1).values
    count = errors.shape[-1]
    return errors[..., int(used.trim_low * count) : count - int(used.trim_high * count)].sum(-1)


KEYS = ["int4", "int4_asym", "fp4", "nf4", "nvfp4", "nvint4", "mxfp4", "mxint4", "mxfp8"]
TRIMMED = [
    ("int4", {"trim_high": 0.04}),
    ("int4_asym", {"trim_low": 0.3, "trim_high": 0.1}),
    ("mxfp4", {"trim_low": 0.3}),
]


@pytest.mark.parametrize(("key", "trims"), [*((key, {}) for key in KEYS), *TRIMMED])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group-32"])
def test_the_search_equals_brute_force(key, trims, granularity):
    x = heavy_tailed(3, 96)
    used = scheme(key, granularity=granularity, range="mse", mse_steps=20, **trims)
    plain = scheme(key, granularity=granularity)
    global_scale = find_parameters(x, plain).global_scale
    errors = []
    for i in range(16):
        shrunk = plain if i == 0 else scheme(key, granularity=granularity, clip_ratio=1 - i / 20)
        values = fake_quantize(x, shrunk, find_parameters(x, shrunk, global_scale))
        errors.append(summed(values, x, used))
    if (values := covering(x, plain, global_scale)) is not None:
        errors.append(summed(values, x, used))
    found = summed(fake_quantize(x, used), x, used)
    best = torch.stack(errors).amin(0)
    assert (found <= best * (1 + 1e-4)).all() and (found >= best * (1 - 1e-4)).all()
    assert (found <= errors[0]).all()


@pytest.mark.parametrize("key", ["int4", "int4_asym", "mxfp4"])
def test_shares_below_one_element_leave_out_nothing(key):
    x = heavy_tailed(6, 96)
    plain, trimmed = (
        find_parameters(x, scheme(key, group_size=32, range="mse", trim_low=share, trim_high=share))
        for share in (0.0, 0.03)
    )
    assert torch.equal(plain.scale, trimmed.scale)
    assert plain.zero_point is None or torch.equal(plain.zero_point, trimmed.zero_point)


@pytest.mark.parametrize(
    "scale_format, dtype", [("fp32", torch.float32), ("fp16", torch.float64), ("bf16", torch.bfloat16)]
)
@pytest.mark.parametrize("key", [*KEYS, "int8"])
def test_blocks_that_are_left_out_have_the_parameters_of_the_whole_search(key, scale_format, dtype, monkeypatch):
    own = {} if PRESETS[key]["block"] else {"scale_format": scale_format, "granularity": "group-32"}
    used = scheme(key, range="mse", **own, **({"symmetric": False} if key == "int8" else {}))
    x = heavy_tailed(64, 256)
    x[:4] = 0
    x[4:8] *= 1e-9
    x[8:16] = x[8:16].abs()
    x[16:24] = (x[16:24] * 8).round() / 8  # some blocks have no error at all
    x, searched = x.to(dtype), []
    errors = ranges.block_errors
    monkeypatch.setattr(
        ranges, "block_errors", lambda values, *more: searched.append(len(values)) or errors(values, *more)
    )
    found = find_parameters(x, used)
    assert min(searched) < max(searched) or len(searched) < 20
    monkeypatch.setattr(ranges._Blocks, "least_errors", lambda blocks, *_: torch.zeros_like(blocks.high))
    whole = find_parameters(x, used)
    assert torch.equal(load_scale(found.scale, used.storage), load_scale(whole.scale, used.storage))
    assert found.zero_point is None or torch.equal(found.zero_point, whole.zero_point)


def test_one_outlier_in_a_block_does_not_move_a_trimmed_range():
    """The second search has the candidates of the first and larger ones, which help no integer."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    x[:, 5] = 0.0
    alone = find_parameters(x, scheme("int4", range="mse", mse_steps=50, mse_grid=1.0)).scale
    x[:, 5] = 2 * x.abs().amax(-1)
    plain, trimmed = (
        find_parameters(x, scheme("int4", range="mse", mse_grid=1.0, trim_high=share)).scale for share in (0.0, 1 / 64)
    )
    assert torch.allclose(trimmed, alone, rtol=1e-5)
    assert (plain > 1.2 * alone).all()


def loss(x, used):
    """Sum of |x - quantized x|**2.4 of every block."""
    return summed(fake_quantize(x, used), x, used)


SYMMETRIC = [name for name, preset in PRESETS.items() if preset["weight"] and not name.startswith("kmeans")]
SEARCHED = [computed(scheme(name, group_size=32)) for name in SYMMETRIC if scheme(name).range == "minmax"]
SEARCHED += [
    scheme("mxfp4", element=element, scale_rule=rule) for rule in E8M0_RULES for element in ("e2m1", "e4m3", "int4")
]
SEARCHED += [
    scheme("nvfp4", scale_format=name, element=element) for name in SCALE_FORMATS for element in ("e2m1", "int3")
]
SEARCHED += [activation_scheme("fp4_ue2m2", scale_format=name, group_size=16) for name in ("fp32", "e8m0", "e4m3")]
SEARCHED += [scheme("int4_asym", scale_format="e8m0", scale_rule=rule, group_size=32) for rule in E8M0_RULES]


@pytest.mark.parametrize("plain", SEARCHED, ids=lambda used: f"{used.element}-{used.scale_format}-{used.scale_rule}")
def test_the_search_is_no_worse_than_the_extremes_in_any_block(plain):
    for x in (heavy_tailed(24, 192), torch.randn(24, 192, generator=torch.Generator().manual_seed(1)) * 1e-3):
        searched, extremes = loss(x, QuantScheme(**{**plain.to_dict(), "range": "mse"})), loss(x, plain)
        assert (searched <= extremes * (1 + 1e-4)).all()


@pytest.mark.parametrize("rule", E8M0_RULES)
@pytest.mark.parametrize("element", ["e2m1", "e2m3", "e4m3"])
def test_the_search_of_powers_of_two_finds_the_best_of_all(element, rule):
    """Blocks of 32, with the range from ``mse`` against that from ``exhaustive``."""
    x = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
    searched, best = (
        loss(x, scheme("mxfp4", element=element, scale_rule=rule, range=kind)) for kind in ("mse", "exhaustive")
    )
    assert (searched <= best * (1 + 2e-4)).all()


def test_the_search_offers_the_power_that_the_floor_rule_leaves_out():
    x = torch.randn(1024, 32, generator=torch.Generator().manual_seed(0))
    plain, searched = (find_parameters(x, scheme("mxfp4", range=kind)).scale.int() for kind in ("minmax", "mse"))
    assert 0.1 < (searched == plain + 1).float().mean() < 0.2 and (searched <= plain + 1).all()
    assert loss(x, scheme("mxfp4", range="mse")).sum() < 0.95 * loss(x, scheme("mxfp4")).sum()


@pytest.mark.parametrize("name", [name for name, storage in SCALE_FORMATS.items() if storage.global_scale == "needed"])
def test_the_search_offers_the_scale_above_the_nearest(name):
    """Covers scales that rounding to nearest makes zero, and with them a whole block."""
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 64)[:, None].repeat(
        4, 1
    )
    plain, searched = (
        find_parameters(x, scheme("nvfp4", scale_format=name, range=kind)).scale.float() for kind in ("minmax", "mse")
    )
    assert (searched > plain).float().mean() > 0.05


def test_e8m0_search_tries_only_what_differs():
    assert shrink_factors(scheme("mxfp4", range="mse")) == [1, 0.5, 0.25, 1 - 79 / 100]
    assert len(shrink_factors(scheme("int4", range="mse"))) == 80


def test_percentile_is_the_nearest_rank():
    x = torch.arange(1.0, 101)[None]
    assert find_parameters(-x, scheme("int8", range="percentile", percentile=90)).scale.item() == pytest.approx(
        90 / 127
    )
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
    """Whatever way is the fastest for a block's size: signed zeros, subnormals, infinities and NaN,
    and rows that do not lie next to each other."""
    used, blocks = (
        scheme("int4" if symmetric else "int4_asym", group_size=size),
        heavy_tailed(12, 5 * size).to(dtype).unflatten(-1, (5, size)),
    )
    for row, value in enumerate((0.0, -0.0, torch.finfo(dtype).tiny / 4, -math.inf, math.inf, math.nan)):
        blocks[row, 2] = value
        blocks[row, 4, -1] = value
    plain = blocks.float() if dtype != torch.float64 else blocks
    for values, exact in ((blocks, plain), (blocks[::2], plain[::2]), (blocks.transpose(0, 1), plain.transpose(0, 1))):
        low, high = block_ranges(values, used)
        wanted = (
            (None, exact.abs().amax(-1)) if symmetric else (exact.amin(-1).clamp(max=0), exact.amax(-1).clamp(min=0))
        )
        assert torch.equal(
            high.view(torch.int32)[~high.isnan()], (wanted[1].float().abs()).view(torch.int32)[~high.isnan()]
        )
        assert torch.equal(high.isnan(), exact.isnan().any(-1))
        assert (low is None) == symmetric and (
            symmetric or torch.equal(low[~low.isnan()], wanted[0].float()[~low.isnan()])
        )


def test_a_share_of_elements_is_whole():
    assert [whole(0.29, 100), whole(0.29, 200), whole(0.3, 32), whole(0.0, 5)] == [29, 58, 9, 0]
