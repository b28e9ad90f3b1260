"""``range: exhaustive`` against every scale code there is, on Gaussian, heavy-tailed, tiny and
degenerate blocks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgrid.quantizer import QuantizationParameters, fake_quantize, find_parameters
from quantgrid.quantizer.scales import STORAGE_DTYPES
from quantgrid.schemes import QuantScheme, scheme
from quantgrid.schemes.number_formats import SCALE_FORMATS

NARROW = [name for name, storage in SCALE_FORMATS.items() if storage.bits <= 8]


def every_code(name):
    storage = SCALE_FORMATS[name]
    codes = [
        code for code, value in enumerate(storage.values()) if math.isfinite(value) and math.copysign(1, value) > 0
    ]
    codes = torch.tensor(codes, dtype=torch.uint8)
    return codes.view(STORAGE_DTYPES[name]) if name in STORAGE_DTYPES else codes


def block_errors(x, values, used):
    blocks = (x.double() - values.double()).abs().reshape(*used.scale_shape(x.shape), -1)
    peak = x.double().abs().reshape(blocks.shape).amax(-1, keepdim=True)
    return torch.where(peak > 0, blocks / peak, 0.0).pow(used.mse_norm).sum(-1)


def best_of_all(x, used, global_scale):
    shape = used.scale_shape(x.shape)
    fixed = [QuantizationParameters(code.expand(shape), None, global_scale) for code in every_code(used.scale_format)]
    return torch.stack([block_errors(x, fake_quantize(x, used, parameters), used) for parameters in fixed]).amin(0)


def blocks(seed, size):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(48, size, generator=generator)
    x[8:16] = x[8:16] ** 3
    x[16:24, 0] *= 30
    x[24:32] = x[24:32].sign() * torch.rand(8, size, generator=generator)
    x[32:40] *= torch.logspace(-7, 0, 8)[:, None]  # down to scales that are subnormal or vanish
    x[40:46] = torch.randint(-6, 7, (6, size), generator=generator).float()
    x[46], x[47] = 0.0, 1.0
    return x


def assert_best(x, used):
    found = find_parameters(x, used)
    error, best = block_errors(x, fake_quantize(x, used), used), best_of_all(x, used, found.global_scale)
    assert (error <= best * (1 + 2e-4) + 1e-12).all()
    widest = fake_quantize(x, QuantScheme(**{**used.to_dict(), "range": "minmax"}))
    assert (error <= block_errors(x, widest, used) * (1 + 2e-4) + 1e-12).all()


@pytest.mark.parametrize("scale_format", NARROW)
@pytest.mark.parametrize("size", [4, 16, 32])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_no_code_is_better(scale_format, size, norm):
    assert_best(
        blocks(0, size), scheme("mxfp4", scale_format=scale_format, group_size=size, range="exhaustive", mse_norm=norm)
    )


@pytest.mark.parametrize("element", ["e2m3", "e3m2", "e4m3", "e5m2"])
@pytest.mark.parametrize("scale_format", ["e8m0", "e4m3"])
def test_no_code_is_better_for_wider_elements(element, scale_format):
    assert_best(
        blocks(1, 16), scheme("mxfp4", element=element, scale_format=scale_format, group_size=16, range="exhaustive")
    )


@pytest.mark.parametrize("overrides", [{"scale_rule": "four_thirds"}, {"scale_format": "e4m3", "global_scale": "none"},
                                       {"scale_format": "e4m3", "global_scale": "token"},
                                       {"scale_format": "e4m3", "granularity": "tensor"}])  # fmt: skip
def test_no_code_is_better_under_other_options(overrides):
    assert_best(blocks(2, 32), scheme("mxfp4", range="exhaustive", **overrides))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["e8m0", "e4m3"]), st.sampled_from([1.0, 2.0, 2.4, 4.0]))
def test_no_code_is_better_for_any_seed(seed, scale_format, norm):
    assert_best(
        blocks(seed, 16), scheme("mxfp4", scale_format=scale_format, group_size=16, range="exhaustive", mse_norm=norm)
    )


def test_gain_over_the_rules_on_gaussian_blocks():
    x = torch.randn(2048, 32, generator=torch.Generator().manual_seed(0))
    for name in ("mxfp4", "nvfp4"):
        plain, searched = (
            fake_quantize(x, scheme(name, range=kind, mse_norm=2.0)) for kind in ("minmax", "exhaustive")
        )
        assert (searched - x).square().mean() < 0.97 * (plain - x).square().mean()
