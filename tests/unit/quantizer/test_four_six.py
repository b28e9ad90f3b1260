"""Tests of ``range: four_six``: the choice per block against both scales tried apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantgrid.ground.errors import ConfigError, NumericalFailure
from quantgrid.quantizer import fake_quantize, find_parameters, ranges
from quantgrid.quantizer.rounding import compute_dtype
from quantgrid.quantizer.scales import QuantizationParameters
from quantgrid.schemes import QuantScheme, scheme

FOUR_SIX = scheme("nvfp4", range="four_six")
PLAIN = scheme("nvfp4")
PLAIN_OF = {size: scheme("nvfp4", group_size=size) for size in (16, 8)}
BEST = scheme("nvfp4", range="exhaustive", mse_norm=2.0)


def errors(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Squared errors by block of 16."""
    return (x - rounded).unflatten(-1, (-1, 16)).square().sum(-1)


def samples(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator)
    return x if kind == "normal" else x / torch.rand(64, 256, generator=generator).clamp(min=0.05)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_every_block_takes_the_better_of_both_scales_tried_apart(kind):
    x = samples(kind)
    top = x.abs().amax() / (6 * 256)
    by_hand = []
    for largest in (6, 4):
        scale = (x.unflatten(-1, (-1, 16)).abs().amax(-1) / largest / top).to(torch.float8_e4m3fn)
        by_hand.append(fake_quantize(x, PLAIN, QuantizationParameters(scale, None, top.view(1, 1))))
    six, four = (errors(x, rounded) for rounded in by_hand)
    rounded = fake_quantize(x, FOUR_SIX)
    expected = torch.where((four < six).repeat_interleave(16, -1), by_hand[1], by_hand[0])
    assert torch.equal(rounded, expected)
    assert 0.1 < (four < six).float().mean() < 0.6


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_the_error_lies_between_the_exhaustive_search_and_the_plain_scale(kind):
    x = samples(kind)
    level = find_parameters(x, FOUR_SIX).global_scale
    found = {
        name: errors(x, fake_quantize(x, given, find_parameters(x, given, level)))
        for name, given in (("plain", PLAIN), ("four_six", FOUR_SIX), ("best", BEST))
    }
    assert (found["four_six"] <= found["plain"]).all()
    assert (found["best"] <= found["four_six"] * (1 + 1e-5)).all()
    assert found["four_six"].sum() < 0.95 * found["plain"].sum()


def test_six_and_five_are_held_better_with_four_at_the_top():
    """Scale 1.5 gives 6 and 4.5, scale 1 gives 6 and 4 (5 is a tie that goes to the even code)."""
    x = torch.zeros(1, 16)
    x[0, :2] = torch.tensor([6.0, 5.0])
    parameters = find_parameters(x, FOUR_SIX, 1.0)
    assert parameters.scale.float().item() == 1.5
    assert fake_quantize(x, FOUR_SIX, parameters)[0, :3].tolist() == [6.0, 4.5, 0.0]
    assert fake_quantize(x, PLAIN, find_parameters(x, PLAIN, 1.0))[0, :2].tolist() == [6.0, 4.0]


def test_zeros_stay_zero_and_the_largest_scale_fits():
    x = torch.zeros(2, 32)
    x[0, 0] = 3e4
    parameters = find_parameters(x, FOUR_SIX)
    assert parameters.scale.float().amax() <= 384
    assert torch.equal(fake_quantize(x, FOUR_SIX, parameters) == 0, x == 0)


def test_the_preset_searches_weights_and_takes_four_or_six_for_activations():
    from quantgrid.schemes import activation_scheme

    assert scheme("nvfp4_46").range == "exhaustive"
    activation = activation_scheme("nvfp4_46")
    assert (activation.range, activation.global_scale) == ("four_six", "token")


@pytest.mark.parametrize(
    "name, given",
    [
        ("mxfp4", {}),
        ("int4", {}),
        ("nvint4", {}),
        ("nvfp4", {"clip_ratio": 0.9}),
        ("nvfp4", {"global_scale": "none"}),
        ("nvfp4", {"trim_low": 0.1}),
        ("nvfp4", {"trim_high": 0.1}),
    ],
)
def test_other_formats_are_refused(name, given):
    with pytest.raises(ConfigError, match="four_six"):
        scheme(name, range="four_six", **given)


@pytest.mark.parametrize("field, given", [("mse_norm", 2.0), ("mse_norm", 3), ("mse_steps", 50), ("mse_grid", 0.5)])
def test_options_of_other_searches_are_refused(field, given):
    with pytest.raises(ConfigError, match=f"{field} {given} contradicts range 'four_six'.*: leave {field} out"):
        scheme("nvfp4", range="four_six", **{field: given})
    default = getattr(FOUR_SIX, field)
    assert scheme("nvfp4", range="four_six", **{field: default}) == FOUR_SIX


def test_a_block_has_any_size():
    x = samples("heavy")
    rounded = {size: fake_quantize(x, scheme("nvfp4", range="four_six", group_size=size)) for size in (8, 32)}
    assert (x - rounded[8]).square().sum() < (x - rounded[32]).square().sum()


def one_after_the_other(x: torch.Tensor, used: QuantScheme, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and values of ``x`` (rows, n): each candidate in a pass alone, and an error of each block, in units of
    its largest magnitude."""
    blocks = x.unflatten(-1, (-1, used.group_size))
    high = blocks.float().abs().amax(-1)
    unit = torch.where(high > 0, 1 / high, 0.0).to(compute_dtype(x.dtype)).unsqueeze(-1)
    found = []
    for factor in (1.0, 1.5):
        wanted = torch.where(level > 0, high * factor / 6 / level, 0.0)
        parameters = QuantizationParameters(wanted.clamp(max=448).to(torch.float8_e4m3fn), None, level)
        wide = fake_quantize(x.to(unit.dtype), PLAIN_OF[used.group_size], parameters).view_as(blocks)
        found.append((parameters.scale, wide, (wide - blocks).mul(unit).square().sum(-1).float()))
    (six, values, error), (four, other_values, other_error) = found
    better = other_error < error
    scale = torch.where(better, four.view(torch.uint8), six.view(torch.uint8))
    return scale, torch.where(better.unsqueeze(-1), other_values, values).view_as(x).to(x.dtype)


def tied() -> torch.Tensor:
    """Blocks that both scales hold exactly, and blocks of 6 and 5 at several magnitudes."""
    x = torch.zeros(16, 64)
    x[:8, ::4] = torch.tensor([6.0, 4.0, -3.0, -6.0]).repeat(4)
    x[8:, ::16], x[8:, 1::16] = 6.0, 5.0
    return x * torch.logspace(-3, 3, 16, base=2).unsqueeze(-1)


INPUTS = {
    "normal": lambda: samples("normal"),
    "heavy": lambda: samples("heavy"),
    "zeros": lambda: torch.cat([torch.zeros(2, 64), -torch.zeros(2, 64)]),
    "some zeros": lambda: samples("normal") * (torch.arange(256) // 16 % 3 > 0),
    "coarse": lambda: (samples("normal") * 2).round(),
    "tied": tied,
    "huge": lambda: samples("normal") * 1e4,
    "tiny": lambda: samples("normal") * 1e-6,
    "wide": lambda: samples("normal") * torch.logspace(-7, 4, 256),
    "largest": lambda: samples("normal").clamp(-1, 1) * torch.finfo(torch.float32).max,
    "smallest": lambda: samples("normal") * 1e-42,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("level, size", [("tensor", 8), ("token", 16), ("static", 16)])
def test_both_scales_at_once_are_bit_identical_to_one_after_the_other(level, size, kind, dtype, monkeypatch):
    x, used = INPUTS[kind]().to(dtype), scheme("nvfp4", range="four_six", group_size=size, global_scale=level)
    if not x.isfinite().all():
        with pytest.raises(NumericalFailure):
            fake_quantize(x, used, global_scale=0.01 if level == "static" else None)
        return
    given = torch.tensor(0.01) if level == "static" else None
    monkeypatch.setattr(ranges, "_CACHED_ELEMENTS", 50 * x.shape[-1])
    parameters = find_parameters(x, used, given)
    scale, values = one_after_the_other(x, used, parameters.global_scale)
    assert torch.equal(parameters.scale.view(torch.uint8), scale)
    for rounded in (fake_quantize(x, used, global_scale=given), fake_quantize(x, used, parameters)):
        assert rounded.dtype == dtype
        assert torch.equal(rounded, values) and torch.equal(rounded.signbit(), values.signbit())


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_long_blocks_take_the_better_scale_too(granularity):
    x, used = samples("heavy"), scheme("nvfp4", range="four_six", granularity=granularity, group_size=None)
    plain = replace(used, range="minmax")
    parameters, shape = find_parameters(x, used), (-1, x.numel() if granularity == "tensor" else x.shape[-1])
    high = x.view(shape).abs().amax(-1).view(parameters.scale.shape)
    tried = [
        replace(parameters, scale=(high * factor / 6 / parameters.global_scale).to(torch.float8_e4m3fn))
        for factor in (1.0, 1.5)
    ]
    found = [(fake_quantize(x, plain, one) - x).view(shape).square().sum(-1) for one in tried]
    assert torch.allclose((fake_quantize(x, used) - x).view(shape).square().sum(-1), torch.minimum(*found))


def test_the_global_scale_is_given_once():
    x = samples("normal")
    parameters = find_parameters(x, FOUR_SIX)
    with pytest.raises(ConfigError, match="global_scale is given beside parameters"):
        fake_quantize(x, FOUR_SIX, parameters, global_scale=1.0)
